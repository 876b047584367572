"""Which wrappers of an environment agents take, and which they refuse."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from tiny import tiny_agent, tiny_envs, tiny_policy

from agents import GRPO, evaluate, held_out_scenes
from agents.inner_env import inner_env
from var_env import VARTextEnv, VARTextVectorEnv
from var_env.sb3 import FlattenCanvas, VARTextVecEnv


class Untouched(gym.Wrapper):
    """Adds an attribute."""

    note = "mine"


class Halved(gym.Wrapper):
    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        return observation, reward / 2, *rest


class OwnSingle(VARTextEnv):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, -reward, *rest


class OwnBatch(VARTextVectorEnv):
    def reset(self, **how):
        return super().reset(seed=0)


class OwnWorld(VARTextVectorEnv):
    """Other arguments, the same steps."""

    def __init__(self, **parts):
        super().__init__(2, **parts)


HARMLESS = {
    "made": lambda parts: gym.make("VARText-v0", **parts),
    "statistics": lambda parts: wrappers.RecordEpisodeStatistics(gym.make("VARText-v0", **parts)),
    "batch statistics": lambda parts: wrappers.vector.RecordEpisodeStatistics(tiny_envs(parts)),
    "monitor": lambda parts: Monitor(gym.make("VARText-v0", **parts)),
    "flat": lambda parts: FlattenCanvas(gym.make("VARText-v0", **parts)),
    "own": lambda parts: Untouched(VARTextEnv(**parts)),
    "three steps": lambda parts: wrappers.TimeLimit(VARTextEnv(**parts), 3),
    "class": lambda parts: OwnWorld(**parts),
    "adapter": lambda parts: VARTextVecEnv(tiny_envs(parts)),
    "adapter, monitored": lambda parts: VecMonitor(VARTextVecEnv(tiny_envs(parts))),
}
REFUSED = {
    "reward": (lambda env: wrappers.TransformReward(env, lambda r: -100 * r), "TransformReward.* reward="),
    "clipped": (lambda env: wrappers.ClipReward(env, 0, 1), "ClipReward.* reward="),
    "normalised": (lambda env: wrappers.NormalizeReward(env), "NormalizeReward.* reward="),
    "observation": (
        lambda env: wrappers.TransformObservation(env, lambda o: o, env.observation_space),
        "TransformObservation.* world=",
    ),
    "action": (lambda env: wrappers.TransformAction(env, lambda a: a, env.action_space), "TransformAction.* decoding="),
    "sticky": (lambda env: wrappers.StickyAction(env, 0.5), "StickyAction.* decoding="),
    "own": (Halved, "Halved.* reward=.*world=.*decoding="),
    "inside a harmless one": (lambda env: wrappers.RecordEpisodeStatistics(Halved(env)), "Halved"),
    "inside an adapter": (lambda env: DummyVecEnv([lambda: env]), "agents need VARText-v0"),
    "two steps": (lambda env: wrappers.TimeLimit(env, 2), "2 of 3 grids"),
}
REFUSED_BATCHES = {
    "reward": (lambda envs: wrappers.vector.TransformReward(envs, lambda r: -r), "TransformReward.* reward="),
    "normalised": (lambda envs: wrappers.vector.NormalizeReward(envs), "NormalizeReward.* reward="),
    "observation": (lambda envs: wrappers.vector.TransformObservation(envs, lambda o: o), "world="),
    "action": (lambda envs: wrappers.vector.TransformAction(envs, lambda a: a), "TransformAction.* decoding="),
    "inside an adapter": (
        lambda envs: VARTextVecEnv(wrappers.vector.TransformReward(envs, lambda r: -r)),
        "TransformReward",
    ),
    "of stable-baselines3": (lambda envs: VecNormalize(VARTextVecEnv(envs), norm_obs=False), "VecNormalize"),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_wrappers_pass(parts, kind):
    env = HARMLESS[kind](parts)
    assert isinstance(inner_env(env), VARTextEnv | VARTextVectorEnv)
    agent = GRPO(tiny_policy(parts["tokenizer"]), env, group_size=2, prompts_per_update=2, device="cpu", seed=0)
    agent.learn(1)
    assert agent.n_updates == 1 and parts["reward"].calls == 1


@pytest.mark.parametrize("kind", REFUSED)
def test_wrappers_that_would_vanish(parts, kind):
    wrap, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        tiny_agent(parts).set_env(wrap(gym.make("VARText-v0", **parts)))


@pytest.mark.parametrize("kind", REFUSED_BATCHES)
def test_wrappers_of_batches_that_would_vanish(parts, kind):
    wrap, message = REFUSED_BATCHES[kind]
    with pytest.raises(ValueError, match=message):
        tiny_agent(parts).set_env(wrap(tiny_envs(parts)))


@pytest.mark.parametrize("env", [OwnSingle, OwnBatch])
def test_classes_with_steps_of_their_own(parts, env):
    with pytest.raises(ValueError, match=f"{env.__name__}.*reward="):
        tiny_agent(parts).set_env(env(**parts))


def test_other_environments(parts):
    for env in (gym.make("CartPole-v1"), gym.make_vec("VARText-v0", 2, vectorization_mode="sync", **parts), None, 3):
        with pytest.raises(ValueError, match="agents need VARText-v0"):
            inner_env(env)


def test_evaluations_refuse_them_as_well(parts):
    policy, envs = tiny_policy(parts["tokenizer"]), tiny_envs(parts)
    scenes = held_out_scenes(envs.world, 2)
    counted = wrappers.vector.RecordEpisodeStatistics(envs)
    found = [evaluate(policy, env, scenes) for env in (envs, counted, gym.make("VARText-v0", **parts), parts)]
    assert all(np.array_equal(one.scores, found[0].scores) for one in found)
    with pytest.raises(ValueError, match="TransformReward"):
        evaluate(policy, wrappers.vector.TransformReward(envs, lambda r: -r), scenes)
