"""Rewards: from images to numbers. Imports neither the environment nor the agents.

>>> import rewards
>>> reward = rewards.make("ocr", penalty_weight=0.6)
>>> reward.name
'ocr'
"""

import inspect
from typing import Any

from rewards.base import HasWords, Reward, RewardOutput
from rewards.clip import CLIPScore
from rewards.ocr import OCRReward

__all__ = ["CLIPScore", "HasWords", "OCRReward", "Reward", "RewardOutput", "make"]

_REWARDS: dict[str, type[Reward]] = {"ocr": OCRReward, "clip": CLIPScore}


def make(name: str, **kwargs: Any) -> Reward:
    """The reward called `name`, built with `kwargs`. ValueError, naming what exists, for an unknown one."""
    if name not in _REWARDS:
        raise ValueError(f"unknown reward {name!r}; available: {', '.join(_REWARDS)}")
    options = list(inspect.signature(_REWARDS[name]).parameters)
    unknown = sorted(set(kwargs) - set(options))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of reward {name!r}; available: {', '.join(options)}")
    return _REWARDS[name](**kwargs)
