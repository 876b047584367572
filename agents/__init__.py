"""Agents for VARText: who acts and how it learns.

>>> from agents import GRPO  # doctest: +SKIP
>>> GRPO("base", "VARText-v0").learn(6 * 64 * 100)  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.best_of_n import BestOfN
    from agents.callbacks import BestCheckpoint, CheckpointEvery, HeldOutEval, Interrupt, StopAfter, StopOnSignal
    from agents.checkpoints import Checkpoints, load
    from agents.conflict import ConflictProbe
    from agents.evaluation import bootstrap_interval, evaluate, held_out_scenes
    from agents.grpo import GRPO
    from agents.mask_propagation import MaskPropagation
    from agents.panw import PANW
    from agents.ppo import PPO
    from agents.raft import RAFT
    from agents.recipes import make
    from agents.reinforce import REINFORCE
    from agents.rloo import RLOO
    from agents.sampling import Decoding
    from agents.stage import EntropyReward, SimilarityAdvantage, SimilarityKL
    from agents.tree import TreeGRPO
    from agents.vmr import VMR
    from agents.wrapper import Wrapper

_HOMES = {  # imported when first asked for: torch and Stable-Baselines3 take seconds
    "PANW": "panw",
    "PPO": "ppo",
    "RAFT": "raft",
    "REINFORCE": "reinforce",
    "RLOO": "rloo",
    "VMR": "vmr",
    "Agent": "base",
    "BestCheckpoint": "callbacks",
    "BestOfN": "best_of_n",
    "CheckpointEvery": "callbacks",
    "Checkpoints": "checkpoints",
    "ConflictProbe": "conflict",
    "HeldOutEval": "callbacks",
    "Interrupt": "callbacks",
    "StopAfter": "callbacks",
    "StopOnSignal": "callbacks",
    "bootstrap_interval": "evaluation",
    "evaluate": "evaluation",
    "held_out_scenes": "evaluation",
    "GRPO": "grpo",
    "LocalCredit": "local_credit",
    "MaskPropagation": "mask_propagation",
    "Decoding": "sampling",
    "EntropyReward": "stage",
    "SimilarityAdvantage": "stage",
    "SimilarityKL": "stage",
    "TreeGRPO": "tree",
    "Wrapper": "wrapper",
    "load": "checkpoints",
    "make": "recipes",
    "register": "common.registry",
}
__all__ = [
    "GRPO",
    "PANW",
    "PPO",
    "RAFT",
    "REINFORCE",
    "RLOO",
    "VMR",
    "Agent",
    "BestCheckpoint",
    "BestOfN",
    "CheckpointEvery",
    "Checkpoints",
    "ConflictProbe",
    "Decoding",
    "EntropyReward",
    "HeldOutEval",
    "Interrupt",
    "LocalCredit",
    "MaskPropagation",
    "SimilarityAdvantage",
    "SimilarityKL",
    "StopAfter",
    "StopOnSignal",
    "TreeGRPO",
    "Wrapper",
    "bootstrap_interval",
    "evaluate",
    "held_out_scenes",
    "load",
    "make",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"agents.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
