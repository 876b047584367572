"""Agents for VARText: who acts and how it learns.

>>> from agents import GRPO  # doctest: +SKIP
>>> GRPO("base", "VARText-v0").learn(6 * 64 * 100)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.callbacks import HeldOutEval, StopAfter
    from agents.evaluation import bootstrap_interval, evaluate, held_out_scenes
    from agents.grpo import GRPO
    from agents.sampling import Decoding

_HOMES = {  # imported when first asked for: torch and Stable-Baselines3 take seconds
    "Agent": "base",
    "HeldOutEval": "callbacks",
    "StopAfter": "callbacks",
    "bootstrap_interval": "evaluation",
    "evaluate": "evaluation",
    "held_out_scenes": "evaluation",
    "GRPO": "grpo",
    "Decoding": "sampling",
}
__all__ = ["GRPO", "Agent", "Decoding", "HeldOutEval", "StopAfter", "bootstrap_interval", "evaluate", "held_out_scenes"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"agents.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
