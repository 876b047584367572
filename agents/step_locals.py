"""What callbacks read of a step in ``self.locals``, under the names of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

import numpy as np

from var_env.sb3 import infos_of
from var_env.vector import VARTextVectorEnv


def step_locals(envs: VARTextVectorEnv) -> dict[str, Any]:
    """The step that sampling environments of N rows have just done.

    Returns:
        ``envs``; ``rewards``, float32 ``(N,)``, 0 before the last grid; ``dones``, bool ``(N,)``; ``infos``, a dict a
        row. While a `RewardPool` scores the images, the last rewards are NaN, and the infos hold no ``score``.
    """
    rows, outcome, over = envs.num_envs, envs.outcome, envs.t == len(envs.schedule)
    infos = infos_of(outcome or {}, rows)
    if outcome is not None:
        rewards = outcome["score"].astype(np.float32)
    else:
        rewards = np.full(rows, np.nan if over else 0.0, np.float32)
    return {"envs": envs, "rewards": rewards, "dones": np.full(rows, over), "infos": infos}
