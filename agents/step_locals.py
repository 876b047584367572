"""What callbacks read of a step in ``self.locals``, under the names of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

import numpy as np

from agents.rollout import Deferred
from var_env.sb3 import infos_of
from var_env.vector import VARTextVectorEnv

UNKNOWN = ("score", "parts", "words_read", "confidences", "regions")  # of an image that is still to be scored


def step_locals(envs: VARTextVectorEnv) -> dict[str, Any]:
    """The step that sampling environments of N rows have just done.

    Returns:
        ``envs``; ``rewards``, float32 ``(N,)``, 0 before the last grid; ``dones``, bool ``(N,)``; ``infos``, a dict a
        row. While a `RewardPool` scores the images, the last rewards are NaN, and the infos hold no ``score``.
    """
    rows, outcome = envs.num_envs, envs.outcome
    rewards = np.zeros(rows, np.float32) if outcome is None else outcome["score"].astype(np.float32)
    infos = infos_of(outcome or {}, rows)
    if outcome is not None and isinstance(envs.reward, Deferred):
        rewards = np.full(rows, np.nan, np.float32)
        infos = [{name: value for name, value in info.items() if name not in UNKNOWN} for info in infos]
    return {"envs": envs, "rewards": rewards, "dones": np.full(rows, outcome is not None), "infos": infos}
