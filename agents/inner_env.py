"""The environment inside what an agent is given, and which wrappers may be around it.

Agents draw their samples in a batch of their own, which forks in the middle of episodes. So they take world, tokenizer
and reward from the environment that they are given, and never call the ``step`` of a wrapper around it.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from var_env.env import VARTextEnv
from var_env.sb3 import FlattenCanvas, VARTextVecEnv
from var_env.vector import VARTextVectorEnv

HARMLESS = (  # they check, count, or let actions have another shape
    wrappers.OrderEnforcing,
    wrappers.PassiveEnvChecker,
    wrappers.RecordEpisodeStatistics,
    wrappers.vector.RecordEpisodeStatistics,
    Monitor,
    VecMonitor,
    FlattenCanvas,
)
REWARD = "put what it does into reward=, a rewards.base.Reward or one of its names"
OBSERVATION = "change the prompts by world=, or what is seen of the tokens in the policy"
ACTION = "change how tokens are drawn by the agent's decoding=, or in the policy"
REMEDIES = (
    ((gym.RewardWrapper, gym.vector.VectorRewardWrapper), REWARD),
    ((wrappers.NormalizeReward, wrappers.vector.NormalizeReward), REWARD),
    ((gym.ObservationWrapper, gym.vector.VectorObservationWrapper), OBSERVATION),
    ((gym.ActionWrapper, gym.vector.VectorActionWrapper), ACTION),
)
AROUND = (gym.Wrapper, gym.vector.VectorWrapper, VecEnvWrapper, VARTextVecEnv)


def inner_env(env: Any) -> VARTextEnv | VARTextVectorEnv:
    """The environment in its wrappers, of Gymnasium or of Stable-Baselines3.

    Raises:
        ValueError: it is no ``VARText-v0``; or a wrapper, or a class derived from it, changes what its steps or resets
            do, which an agent would never see.
    """
    inner = env
    while isinstance(inner, AROUND):
        require_harmless(inner)
        inner = inner.envs if isinstance(inner, VARTextVecEnv) else getattr(inner, "venv", None) or inner.env
    if not isinstance(inner, VARTextEnv | VARTextVectorEnv):
        kind = f"{inner!r}, a VecEnv of other environments" if isinstance(inner, VecEnv) else repr(env)
        raise ValueError(
            f"agents need VARText-v0, as an id, an environment or a batched environment, gym.make_vec('VARText-v0'); "
            f"got {kind}"
        )
    base = VARTextEnv if isinstance(inner, VARTextEnv) else VARTextVectorEnv
    if overrides(inner, base):
        raise ValueError(
            f"agents sample in a VARTextVectorEnv of their own and never call the step and reset of "
            f"{type(inner).__name__}: leave them as they are in {base.__name__}, and {REWARD}; or {OBSERVATION}; "
            f"or {ACTION}"
        )
    return inner


def require_harmless(wrapper: Any) -> None:
    """``ValueError`` naming a wrapper that changes what an agent would have to see, and what to use instead."""
    if isinstance(wrapper, (*HARMLESS, VARTextVecEnv)):
        return
    if isinstance(wrapper, wrappers.TimeLimit):
        grids = len(wrapper.unwrapped.schedule) if isinstance(wrapper.unwrapped, VARTextEnv) else 0
        if wrapper._max_episode_steps < grids:
            raise ValueError(
                f"TimeLimit ends episodes after {wrapper._max_episode_steps} of {grids} grids, before there is an "
                "image to score: leave out max_episode_steps"
            )
        return
    base = gym.Wrapper if isinstance(wrapper, gym.Wrapper) else gym.vector.VectorWrapper
    if isinstance(wrapper, VecEnvWrapper) or overrides(wrapper, base):
        remedies = [remedy for kinds, remedy in REMEDIES if isinstance(wrapper, kinds)]
        raise ValueError(
            f"agents sample in a batch of their own and never call the wrapper {type(wrapper).__name__}: give the "
            f"environment inside it, and {'; or '.join(remedies or [REWARD, OBSERVATION, ACTION])}"
        )


def overrides(env: Any, base: type) -> bool:
    """Whether its class has another ``step`` or ``reset`` than ``base``."""
    return any(getattr(type(env), name) is not getattr(base, name) for name in ("step", "reset"))
