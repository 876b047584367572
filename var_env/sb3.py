"""Adapters to Stable-Baselines3, whose algorithms want flat action spaces and their own kind of vector environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from var_env.mdp import row_of
from var_env.seeding import as_seed
from var_env.vector import VARTextVectorEnv


def flat_action_space(space: spaces.Space) -> spaces.MultiDiscrete:
    """The canvas ``(H, W)`` as ``MultiDiscrete`` of shape ``(H * W,)``, row by row; ``(H * W * D,)`` where a token has
    D > 1 codes, which stand side by side."""
    assert isinstance(space, spaces.MultiDiscrete)
    return spaces.MultiDiscrete(space.nvec.reshape(-1))


def infos_of(info: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """A batched info of a step as Stable-Baselines3 has it, one dict a row."""
    return [{**row_of(info, row), "TimeLimit.truncated": False} for row in range(rows)]


class FlattenCanvas(gym.ActionWrapper[dict[str, Any], np.ndarray, np.ndarray], RecordConstructorArgs):
    """Lets actions of the single environment be flat canvases, ``(H * W,)``.

    Examples:
        >>> env = FlattenCanvas(gym.make("VARText-v0"))  # doctest: +SKIP
        >>> PPO("MultiInputPolicy", env)  # doctest: +SKIP
    """

    def __init__(self, env: gym.Env[dict[str, Any], np.ndarray]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ActionWrapper.__init__(self, env)
        self.action_space = flat_action_space(env.action_space)

    def action(self, action: np.ndarray) -> np.ndarray:
        """``(H * W,)`` to ``(H, W)``, in which shape it may come, too. ``ValueError`` for any other."""
        return _canvas(action, self.action_space.shape, self.env.action_space.shape)


class VARTextVecEnv(VecEnv):
    """A :class:`VARTextVectorEnv` as SB3's ``VecEnv``: flat actions, and a reset right after the end of an episode.

    After the last step the observation is that of the next episode, ``infos[i]["terminal_observation"]`` is the old
    one, and ``infos[i]`` holds what the environment's terminal info does.

    Examples:
        >>> env = VARTextVecEnv(gym.make_vec("VARText-v0", num_envs=8))  # doctest: +SKIP
        >>> PPO("MultiInputPolicy", env)  # doctest: +SKIP
    """

    def __init__(self, envs: VARTextVectorEnv) -> None:
        self.envs = envs
        self._actions: np.ndarray | None = None
        super().__init__(envs.num_envs, envs.single_observation_space, flat_action_space(envs.single_action_space))

    def reset(self) -> VecEnvObs:
        """Start all episodes, with the seeds and options that were set since the last reset."""
        seeds = None if all(seed is None for seed in self._seeds) else self._seeds
        observation, info = self.envs.reset(seed=seeds, options=self._batched_options())
        self.reset_infos = [row_of(info, row) for row in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset: row i by ``seed + i``, 0 to 2**64 - 1."""
        return super().seed(None if seed is None else as_seed(seed))

    def _batched_options(self) -> dict[str, list[Any]]:
        """One dict a row, ``{"prompt": ...}``, to one dict of lists, ``{"prompts": [...]}``."""
        names = {name for options in self._options for name in options}
        if any(set(options) != names for options in self._options):
            raise ValueError(f"all rows must be given the same options, got {self._options}")
        return {f"{name}s": [options[name] for options in self._options] for name in names}

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`: ``(N, H * W)``, or ``(N, H, W)`` as the project's agents predict."""
        assert self.action_space.shape is not None
        canvas = self.envs.action_space.shape
        self._actions = _canvas(actions, (self.num_envs, *self.action_space.shape), canvas)

    def step_wait(self) -> VecEnvStepReturn:
        """Step; after the last grid, also reset."""
        observation, rewards, terminations, _, info = self.envs.step(self._actions)
        infos = infos_of(info, self.num_envs)
        if terminations.all():
            for row in range(self.num_envs):
                infos[row]["terminal_observation"] = row_of(observation, row)
            observation, info = self.envs.reset()
            self.reset_infos = [row_of(info, row) for row in range(self.num_envs)]
        return observation, rewards.astype(np.float32), terminations, infos

    def close(self) -> None:
        self.envs.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One frame a row, for render mode ``"rgb_array"``."""
        return self.envs.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The batched environment's attribute, once a row."""
        return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the batched environment, for all rows."""
        if indices is not None:
            raise ValueError(f"{attr_name!r} can be set for all rows only: they are one environment")
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError(f"rows have no methods of their own: call {method_name!r} on .envs, the whole batch")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in self._get_indices(indices)]


def _canvas(action: Any, flat: tuple[int, ...] | None, canvas: tuple[int, ...] | None) -> np.ndarray:
    action = np.asarray(action)
    if action.shape not in (flat, canvas):
        raise ValueError(f"the action must be a flat canvas of shape {flat}, or {canvas}; got {action.shape}")
    return action.reshape(canvas)
