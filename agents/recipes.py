"""Agents by name: recipes such as ``"vmr+panw+mp"``.

A recipe is an algorithm and the wrappers around it, from the inside out, joined by "+". One that starts with a wrapper
wraps grpo. Your own agent or wrapper joins with one decorator::

    @agents.register("coarse_first")
    class CoarseFirst(Wrapper): ...

    agents.make("vmr+coarse_first", env="VARText-v0", split=4)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from agents.common.registry import AGENTS, Registry

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.wrapper import Wrapper


class Variant(NamedTuple):
    """An algorithm with some of its options set."""

    summary: str
    of: str
    options: dict[str, Any]


BUNDLES: dict[str, tuple[str, ...]] = {  # several wrappers by one name
    "stage": ("similarity", "similarity_kl", "entropy_reward"),
}
VARIANTS: dict[str, Variant] = {  # algorithms that are options of another
    "gspo": Variant(
        "GSPO, ratios of whole images (arXiv 2507.18071)",
        "grpo",
        {"ratio_level": "sequence", "clip_range": 3e-4, "clip_range_high": 4e-4},
    ),
    "gmpo": Variant("GMPO's geometric mean, over each grid (arXiv 2507.20673)", "grpo", {"ratio_level": "grid"}),
    "dr_grpo": Variant("Dr. GRPO, no division by the std (arXiv 2503.20783)", "grpo", {"advantage_scale": "none"}),
    "dapo": Variant(
        "DAPO (arXiv 2503.14476)",
        "grpo",
        {"clip_range_high": 0.28, "aggregation": "token_mean", "dynamic_sampling": "resample", "kl_coef": 0.0},
    ),
}
# Modules whose import registers.
HOMES = (
    *("grpo", "reinforce", "rloo", "raft", "best_of_n", "ppo", "vmr", "tree"),
    *("panw", "mask_propagation", "local_credit", "stage"),
)


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
    everything = known()
    words = [VARIANTS[word].of if word in VARIANTS else word for word in recipe.split("+")]
    names = [name for word in words for name in BUNDLES.get(word, (word,))]
    for name in names:
        if name not in everything:
            available = ", ".join([*everything, *VARIANTS, *BUNDLES])
            raise ValueError(f"unknown agent {name!r} in {recipe!r}: choose from {available}, joined by +")
    parts = [everything[name] for name in names]
    if is_wrapper(parts[0]):
        parts = [everything["grpo"], *parts]
    if not all(is_wrapper(part) for part in parts[1:]):
        raise ValueError(f"{recipe!r} names two algorithms: give one, and wrappers after it")
    return parts


def options_in(recipe: str) -> dict[str, Any]:
    """The options that a recipe's parts have, with their defaults."""
    first = recipe.split("+")[0]
    found = {name: default for part in parts_of(recipe)[::-1] for name, default in options_of(part).items()}
    return found | (VARIANTS[first].options if first in VARIANTS else {})


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
        recipe: such as ``"grpo"``, ``"vmr+panw+mp"`` or ``"gspo+stage"``; `listing` tells the names.
        env, policy: as in `Agent`.
        options: of the algorithm and of the wrappers; each goes to all parts that have it.

    Raises:
        ValueError: an unknown name, or an option that no part has.
    """
    first, known_options = recipe.split("+")[0], options_in(recipe)
    for name in options:
        if name not in known_options:
            raise ValueError(f"{recipe!r} has no option {name!r}: it has {', '.join(sorted(known_options))}")
    options = (VARIANTS[first].options if first in VARIANTS else {}) | options

    def own(part: type) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name in options_of(part)}

    algorithm, *wrappers = parts_of(recipe)
    agent: Agent | Wrapper = algorithm(policy, env, **own(algorithm))
    for wrapper in wrappers:
        agent = wrapper(agent, **own(wrapper))
    return agent


def summary_of(part: type) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(part) or "").partition("\n")[0]


def listing() -> str:
    """What can be named in a recipe, a line each."""
    rows = {name: summary_of(part) for name, part in known().items() if not is_wrapper(part)}
    variants = {
        name: f"{variant.summary}: {variant.of} with {settings(variant.options)}" for name, variant in VARIANTS.items()
    }
    wrappers = {name: summary_of(part) for name, part in known().items() if is_wrapper(part)}
    bundles = {name: " + ".join(parts) for name, parts in BUNDLES.items()}
    lines = ["An agent is an algorithm, and wrappers around it, joined by +, such as vmr+panw+mp.", "", "Algorithms:"]
    lines += [f"  {name:<15} {text}" for name, text in (rows | variants).items()]
    lines += ["", "Wrappers; alone, around grpo:"]
    lines += [f"  {name:<15} {text}" for name, text in (wrappers | bundles).items()]
    return "\n".join(lines)


def settings(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
