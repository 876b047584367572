"""Imports go one way, and nowhere in a circle: read from the code's own import statements.

An import inside a function, and one for type checking alone, count as well: both are how a circle hides. That a module
imports the package it lies in is not counted, since Python does that by itself.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rewards", "var_env", "agents", "examples")
FLOORS = {  # a module may import its own floor and those above it in this table; the longest name that fits counts
    "rewards": ("rewards.",),
    "var_env": ("var_env.",),
    "policies": ("agents.policies.",),
    "common": ("agents.common.",),
    "rollout": (
        "agents.beside",
        "agents.evaluation",
        "agents.inner_env",
        "agents.logs",
        "agents.losses",
        "agents.rollout",
        "agents.sampling",
        "agents.saving.",
        "agents.split_rule",
        "agents.timing",
        "agents.trackers",
    ),
    "base": (
        "agents.base",
        "agents.parameter_groups",
        "agents.progress",
        "agents.restorable",
        "agents.step_locals",
        "agents.trainable",
    ),
    "algorithms and wrappers": ("agents.",),
    "by name, to disk, watched": (
        "agents.recipes",
        "agents.checkpoints",
        "agents.testing",
        "agents.callbacks",
        "agents.conflict",
        "agents.registry",
        "agents.schedules",
        "agents.checkpoint",
        "agents.resume",
        "agents.stored",
    ),
    "experiments": ("agents.experiments.",),
    "cli": ("agents.cli", "examples."),
}
# Kept for foreign code: not imported here, and imports what it likes.
OLD_NAMES = ("agents.policies.contract", "agents.checkpoint", "agents.resume")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(module: str) -> Iterator[str]:
    """The modules of this project that a module imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if node.module in ("agents", "rewards"):
                names = [
                    HOMES.get((node.module, alias.name), name) for alias, name in zip(node.names, names, strict=True)
                ]
        else:
            continue
        for name in names:
            while name and name not in MODULES:  # a function's home
                name = name.rpartition(".")[0]
            if name and name not in ("agents", "rewards"):
                yield name


HOMES = {  # what `from agents import ...` gives, by the imports for type checking in agents/__init__.py
    (package, alias.name): f"{node.module}.{alias.name}"
    for package in ("agents", "rewards")
    for node in ast.walk(ast.parse(MODULES[package].read_text()))
    if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith(f"{package}.")
    for alias in node.names
}
GRAPH = {
    module: set(imported(module)) - {module}
    for module in MODULES
    if module not in ("agents", "rewards", *OLD_NAMES)  # the two packages import when they are asked for a name
}


def floor_of(module: str) -> int:
    """Which floor a module stands on, counted from below."""
    fits = [
        (len(name), floor)
        for floor, names in enumerate(FLOORS.values())
        for name in names
        if module == name or (name.endswith(".") and f"{module}.".startswith(name))
    ]
    return max(fits)[1]


def test_imports_go_one_way():
    pairs = {(module, other) for module, others in GRAPH.items() for other in others}
    upwards = {(module, other) for module, other in pairs if floor_of(other) > floor_of(module)}
    assert not upwards, "imports of a floor above"


def test_there_is_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_old_names_are_for_foreign_code():
    assert not {(module, other) for module, others in GRAPH.items() for other in others if other in OLD_NAMES}


def test_imports_of_every_kind_are_seen():
    assert "agents.panw" in GRAPH["examples.questions.raster"] and "agents.grpo" in GRAPH["agents.vmr"]
    assert "agents.experiments.runs" in GRAPH["agents.experiments.compare"], "inside a function"
    assert "rewards.base" in GRAPH["var_env.mdp"], "for type checking alone"
    assert "agents.conflict" in GRAPH["agents.experiments.runs"], "by a name of the package agents"
