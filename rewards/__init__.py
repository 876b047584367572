"""Rewards: from images to numbers. Imports neither the environment nor the agents.

>>> import rewards
>>> reward = rewards.make("ocr", penalty_weight=0.6)
>>> reward.name
'ocr'
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.base import HasWords, Reward, RewardOutput
    from rewards.clip import CLIPScore
    from rewards.ocr import OCRReward

_HOMES = {  # imported when first asked for
    "CLIPScore": "clip",
    "HasWords": "base",
    "OCRReward": "ocr",
    "Reward": "base",
    "RewardOutput": "base",
}
__all__ = ["CLIPScore", "HasWords", "OCRReward", "Reward", "RewardOutput", "make"]

REWARDS = {  # name: module and class, imported when asked for
    "ocr": "rewards.ocr:OCRReward",
    "ocr_edit": "rewards.ocr_edit:OCREditReward",
    "clip": "rewards.clip:CLIPScore",
    "preference": "rewards.preference:PreferenceReward",
    "hps": "rewards.hps:HPSv3Reward",
    "git": "rewards.git:GITReward",
    "grounding_dino": "rewards.grounding_dino:GroundingDINOReward",
    "geneval": "rewards.geneval:GenEval",
    "combine": "rewards.combine:combine",
    "pool": "rewards.serving.pool:RewardPool",
    "service": "rewards.serving.client:RewardClient",
}


def make(name: str, **kwargs: Any) -> "Reward":
    """The reward called `name`, or of the service at a URL, built with `kwargs`.

    ValueError, naming what exists, for an unknown one.
    """
    if name.startswith(("http://", "https://")):
        name, kwargs = "service", {"url": name, **kwargs}
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; available: {', '.join(REWARDS)}")
    module, _, cls = REWARDS[name].partition(":")
    reward = getattr(import_module(module), cls)
    parameters = inspect.signature(reward).parameters
    options = list(parameters)
    unknown = sorted(set(kwargs) - set(options))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of reward {name!r}; available: {', '.join(options)}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in kwargs:
            raise ValueError(f"reward {name!r} needs the option {option!r}, in gym.make in reward_kwargs")
    return reward(**kwargs)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"rewards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rewards' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
