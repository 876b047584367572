"""Things by name: agents from recipes such as ``"vmr+panw+mp"``, and the small functions in which losses differ.

A recipe is an algorithm and the wrappers around it, from the inside out, joined by "+". One that starts with a wrapper
wraps grpo. Your own agent or wrapper joins with one decorator::

    @agents.register("coarse_first")
    class CoarseFirst(Wrapper): ...

    agents.make("vmr+coarse_first", env="VARText-v0", split=4)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.wrapper import Wrapper

T = TypeVar("T")
U = TypeVar("U")


class Registry(Mapping[str, T]):
    """Named things of one kind, in the order in which they were added.

    Example:
        >>> shapes: Registry[Callable[[float], float]] = Registry("shape")
        >>> @shapes.register("square")
        ... def square(side):
        ...     return side**2
        >>> shapes["square"](3)
        9
        >>> shapes["circle"]
        Traceback (most recent call last):
            ...
        ValueError: unknown shape 'circle': choose one of square
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """A decorator that adds what it decorates. ``ValueError`` when the name is taken."""
        if name in self._entries:
            raise ValueError(f"there is a {self.kind} called {name!r} already: choose another name")

        def add(entry: U) -> U:
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise ValueError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


AGENTS: Registry[type] = Registry("agent")  # algorithms and wrappers
BUNDLES: dict[str, tuple[str, ...]] = {}  # several wrappers by one name
HOMES = ("grpo", "vmr", "panw", "mask_propagation")  # modules whose import registers


def register(name: str) -> Callable[[U], U]:
    """A class decorator: the agent or `Wrapper` is known to `make`, and to the scripts' ``--agents``, by this name.

    Its options are the keywords of its constructor, with their defaults, and the first line of its docstring is what
    lists say of it.
    """
    return AGENTS.register(name)


def known() -> Registry[type]:
    """All algorithms and wrappers by name, those of this package first."""
    for home in HOMES:
        import_module(f"agents.{home}")
    return AGENTS


def is_wrapper(part: type) -> bool:
    """Whether it goes around an agent, or is one."""
    from agents.wrapper import Wrapper

    return issubclass(part, Wrapper)


def parts_of(recipe: str) -> list[type]:
    """The algorithm and the wrappers, from the inside out, that a recipe names.

    Raises:
        ValueError: a name that is not known, or two algorithms.
    """
    names = [name for word in recipe.split("+") for name in BUNDLES.get(word, (word,))]
    parts = [known()[name] for name in names]
    if is_wrapper(parts[0]):
        parts = [known()["grpo"], *parts]
    for name, part in zip(names[::-1], parts[:0:-1], strict=False):
        if not is_wrapper(part):
            raise ValueError(f"{recipe!r} has the algorithm {name!r} after another: only wrappers can follow")
    return parts


def options_of(part: type) -> dict[str, Any]:
    """The keywords of an agent or a wrapper with their defaults, those that it hands on to its base class included."""
    found: dict[str, Any] = {}
    for cls in part.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: default for name, default in found.items() if not name.startswith("_")}


def make(recipe: str, env: Any = "VARText-v0", policy: Any = "base", **options: Any) -> Agent | Wrapper:
    """A new agent from its recipe.

    Args:
        recipe: such as ``"grpo"``, ``"vmr+panw+mp"`` or ``"vmr+stage"``; `known` lists the names.
        env, policy: as in `Agent`.
        options: of the algorithm and of the wrappers; each goes to all parts that have it.

    Raises:
        ValueError: an unknown name, or an option that no part has.
    """
    algorithm, *wrappers = parts_of(recipe)
    takes = [options_of(part) for part in (algorithm, *wrappers)]
    unknown = sorted(options.keys() - {name for part in takes for name in part})
    if unknown:
        available = ", ".join(sorted({name for part in takes for name in part}))
        raise ValueError(f"{recipe!r} has no option {unknown[0]!r}: it has {available}")
    given = [{name: value for name, value in options.items() if name in part} for part in takes]
    agent: Agent | Wrapper = algorithm(policy, env, **given[0])
    for wrapper, own in zip(wrappers, given[1:], strict=True):
        agent = wrapper(agent, **own)
    return agent


def summary_of(part: type) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(part) or "").partition("\n")[0]


def listing() -> str:
    """What can be named in a recipe, a line each."""
    lines = []
    for title, wanted in (("algorithms", False), ("wrappers, around any of them", True)):
        lines.append(f"{title}:")
        lines += [f"  {name:<16} {summary_of(part)}" for name, part in known().items() if is_wrapper(part) is wanted]
    lines += [f"  {name:<16} {' + '.join(parts)}" for name, parts in BUNDLES.items()]
    return "\n".join(lines)
