"""Earlier names of what stands in ``agents/checkpoints.py`` and ``agents/saving/folder.py``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agents.checkpoints import NAME, Checkpoints, class_named, updates_of
from agents.checkpoints import load_folder as load
from agents.restorable import rebuild
from agents.saving import folder as folders
from agents.saving.folder import FORMAT, NOT_STORED, SUMS, digest, verify

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.wrapper import Wrapper


def write(agent: Agent | Wrapper, folder: Path) -> None:
    """See `folder.write`."""
    folders.write(agent.parts(), folder)


def state_of(agent: Agent | Wrapper, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """See `folder.state_of`."""
    return folders.state_of(agent.parts(), tensors)


def read(path: Path, env: Any, device: torch.device | str, replaced: dict[str, Any]) -> Agent | Wrapper:
    """`load` of a checkpoint that is known to be whole."""
    return rebuild(folders.read(path, class_named), env, device, replaced)


def take_part(agent: Agent | Wrapper) -> None:
    """See `Saved.gather`."""
    agent.parts().gather()


def modules_of(agent: Agent | Wrapper) -> dict[str, Any]:
    """The policies that there are, and the tokenizer."""
    return agent.parts().modules


def random_states(agent: Agent | Wrapper) -> dict[str, Any]:
    """Of the sampler, the environments, and the global generators of torch, numpy and Python."""
    return agent.parts().random


def restore_random(agent: Agent | Wrapper, states: dict[str, Any]) -> None:
    """See `Restorable.restore_random`."""
    agent.unwrapped.restore_random(states)


__all__ = [
    "FORMAT",
    "NAME",
    "NOT_STORED",
    "SUMS",
    "Checkpoints",
    "class_named",
    "digest",
    "load",
    "modules_of",
    "random_states",
    "read",
    "restore_random",
    "state_of",
    "take_part",
    "updates_of",
    "verify",
    "write",
]
