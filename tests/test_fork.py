"""Forks: branches of a batch that share what is frozen and nothing that changes."""

import numpy as np
import pytest
import torch

from var_env import VARTextEnv, VARTextVectorEnv

N, K = 2, 3


@pytest.fixture
def envs(parts):
    return VARTextVectorEnv(N, **parts)


def actions(batch, schedule, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(32, size=(batch, *grid)) for grid in schedule.grids]


@pytest.mark.parametrize("m", [0, 1, 2])
def test_a_fork_equals_replaying_the_prefix(parts, envs, m):
    envs.reset(seed=4)
    prefix = actions(N, envs.schedule, 0)[:m]
    for action in prefix:
        envs.step(action)
    forked = envs.fork(K)
    assert forked.num_envs == N * K and forked.action_space.shape == (N * K, 4, 4)
    suffix = actions(N * K, envs.schedule, 1)[m:]
    for action in suffix:
        observation, rewards, terminations, _, info = forked.step(action)
    assert terminations.all()
    for row in range(N * K):
        env = VARTextEnv(**parts)
        env.reset(seed=4 + row // K)
        for action in prefix:
            env.step(action[row // K])
        for action in suffix:
            single, reward, *_, end = env.step(action[row])
        assert np.array_equal(observation["tokens"][row], single["tokens"])
        assert np.array_equal(observation["prompt"][row], single["prompt"])
        assert rewards[row] == pytest.approx(reward, abs=1e-3)
        assert info["words_read"][row] == end["words_read"]


def test_a_fork_and_its_parent_do_not_touch_each_other(envs):
    envs.reset(seed=0)
    first, second, third = actions(N, envs.schedule, 0)
    envs.step(first)
    canvas, tokens = envs.canvas.clone(), envs._state.tokens.copy()
    forked = envs.fork(K)
    for action in actions(N * K, envs.schedule, 1)[1:]:
        forked.step(action)
    forked.reset()
    assert envs.t == 1 and torch.equal(envs.canvas, canvas) and np.array_equal(envs._state.tokens, tokens)
    again = envs.fork(K)
    envs.step(second)
    envs.step(third)
    following = envs.reset()[1]["prompt"]
    assert again.t == 1 and torch.equal(again.canvas, canvas.repeat_interleave(K, 0))
    assert again.reset()[1]["prompt"] == [prompt for prompt in following for _ in range(K)]  # copied generators


def test_what_a_fork_shares(envs, tokenizer, reward):
    envs.reset(seed=0)
    forked = envs.fork(K)
    assert forked.tokenizer is tokenizer and forked.reward is reward and forked.world is envs.world


def test_forks_of_forks_and_forks_by_one(envs):
    envs.reset(seed=0)
    for action in actions(N, envs.schedule, 0)[:2]:
        envs.step(action)
    twice, once = envs.fork(2).fork(3), envs.fork(6)
    assert np.array_equal(twice._state.tokens, once._state.tokens) and torch.equal(twice.canvas, once.canvas)
    assert twice.scenes == once.scenes
    assert torch.equal(envs.fork(1).canvas, envs.canvas)


def test_a_fork_after_the_end_keeps_the_outcome(envs):
    envs.reset(seed=0)
    for action in actions(N, envs.schedule, 0):
        *_, info = envs.step(action)
    end = envs.fork(2)._state.outcome
    assert np.array_equal(end["score"], info["score"].repeat(2))
