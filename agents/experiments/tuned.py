"""Settings that a search found for each agent, as a file: what `tune` writes and `compare` takes.

The file belongs to one world. It names the weights of the base policy and the reward that it was found with, and is
refused for others. A setting that is given on the command line comes before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

WORLD = ("base_weights", "reward", "reward_kwargs", "prompts_from")  # what a file has in common with a run
COMMON = "common"  # the same settings for all agents
TUNED = "tuned"  # the shipped file


def load(choice: str | None, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each agent that was tuned, by its recipe.

    Args:
        choice: ``"common"`` for none, ``"tuned"`` for the shipped file, the path of another one, or ``None`` for the
            shipped file where it fits the world and none where it does not.
        config: of the comparison, with the entries `WORLD`.

    Raises:
        ValueError: the file cannot be read, or was found in another world.
    """
    if choice == COMMON:
        return {}
    shipped = choice is None or choice == TUNED
    source = "the shipped settings" if shipped else str(choice)
    try:
        path = resources.files("agents.experiments") / "tuned.json" if shipped else Path(str(choice))
        content = json.loads(path.read_text(encoding="utf-8"))
        world, agents = content["world"], content["agents"]
        found = {recipe: dict(entry["settings"]) for recipe, entry in agents.items()}
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror or error}; vartext tune writes such a file") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: this is no file of vartext tune ({type(error).__name__}: {error})") from None
    for name in WORLD:
        if world.get(name) != config[name]:
            if choice is None:
                return {}
            raise ValueError(
                f"{source}: found with {name}={world.get(name)}, and here it is {config[name]}: tune the agents in "
                "this world (vartext tune), or give --settings common"
            )
    return found
