"""Things by name: the small functions in which losses differ, and the agents themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Registry(Mapping[str, T]):
    """Named things of one kind, in the order in which they were added.

    Examples:
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


def register(name: str) -> Callable[[U], U]:
    """A class decorator: the agent or `Wrapper` is known to `agents.make`, and to ``--agents``, by this name.

    Its options are the keywords of its constructor, with their defaults, and ``--help-all`` tells what
    ``Annotated[float, "what it does"]`` says of one. The first line of its docstring is what lists say of it.
    """
    return AGENTS.register(name)
