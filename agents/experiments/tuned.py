"""Settings that a search found for each agent, as a file: what `tune` writes and `compare` takes.

The file belongs to one world. It names the weights of the base policy and the reward that it was found with, and is
refused for others. A setting that is given on the command line comes before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

WORLD = ("base_weights", "reward", "reward_kwargs", "prompts_from")  # what a file has in common with a run
COMMON = "common"  # the same settings for all agents
TUNED = "tuned"  # the shipped files
SHIPPED = resources.files("agents.experiments") / "tuned_settings"


def load(choice: str | None, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each agent that was tuned, by its recipe.

    Args:
        choice: ``"common"`` for none, ``"tuned"`` for the shipped files, the path of another one, or ``None`` for the
            shipped files where one fits the world and none where none does.
        config: of the comparison, with the entries `WORLD` and ``images``. Of the shipped files that fit, that counts
            whose trials had the budget nearest to it, as a ratio.

    Raises:
        ValueError: the file cannot be read, or was found in another world.
    """
    if choice == COMMON:
        return {}
    if choice is not None and choice != TUNED:
        world, _, agents = read(Path(choice), choice)
        require_world(world, config, choice)
        return agents
    shipped = [read(path, path.name) for path in SHIPPED.iterdir() if path.name.endswith(".json")]
    fitting = [file for file in shipped if all(file.world.get(name) == config[name] for name in WORLD)]
    if fitting:
        return min(fitting, key=lambda file: abs(math.log(file.images / config["images"]))).agents
    if choice == TUNED:
        require_world(shipped[0].world, config, "the shipped settings")
    return {}


class File(NamedTuple):
    """What a file holds."""

    world: dict[str, Any]
    images: int  # the budget of its trials
    agents: dict[str, dict[str, Any]]  # settings by recipe


def read(path: Any, name: str) -> File:
    """A file that `tune` wrote, called ``name`` in errors."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        agents = {recipe: dict(entry["settings"]) for recipe, entry in content["agents"].items()}
        return File(dict(content["world"]), int(content["budget"]["images"]), agents)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}; vartext tune writes such a file") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: this is no file of vartext tune ({type(error).__name__}: {error})") from None


def require_world(world: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
    """``ValueError`` naming what the world of a file, called ``name``, has not in common with a comparison's."""
    for entry in WORLD:
        if world.get(entry) != config[entry]:
            raise ValueError(
                f"{name}: found with {entry}={world.get(entry)}, and here it is {config[entry]}: tune the agents in "
                "this world (vartext tune), or give --settings common"
            )
