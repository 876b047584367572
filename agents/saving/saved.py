"""The record of an agent that is taken apart, from which it is put together again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Saved:
    """All that an agent is but its environment. Nothing is copied: write it before the agent goes on.

    Attributes:
        agent: its class.
        settings: its attributes by name: options and counters.
        wrappers: their classes and options, from the inside out.
        states: state dicts, of the optimiser and the like. Whole, where several processes share one.
        modules: what has a ``save(path)`` of its own: "policy", "tokenizer", and "reference" and "ema" if any.
        random: states of generators. "sampler" always; and in a folder those of `global_random_states`, and
            "environments" and "environment_seeds" with an entry a row, ``None`` without an environment.
    """

    agent: type
    settings: dict[str, Any]
    wrappers: list[tuple[type, dict[str, Any]]]
    states: dict[str, Any]
    modules: dict[str, Any]
    random: dict[str, Any]

    def gather(self) -> None:
        """What a process has to do while another one writes, where each holds a part of the modules' weights."""
        for module in self.modules.values():
            module.state_dict()


def global_random_states() -> dict[str, Any]:
    """Of the generators of torch, numpy and Python that all share."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


def set_global_random_states(states: dict[str, Any]) -> None:
    """Go back to `global_random_states`. Those of GPUs count only where there are as many."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])
