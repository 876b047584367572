"""Drawing a rollout in parts while a pool of workers scores them."""

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, tiny_agent, weights_of

from agents import GRPO, VMR, StopAfter
from rewards.base import Reward, RewardOutput
from rewards.pool import RewardPool


class Slow(Reward):
    """The brightness, after a while; the first picture of a batch takes the longest, so that answers overtake."""

    name = "slow"

    def __init__(self):
        self.done = []

    def score(self, images, scenes):
        mean = images.mean((1, 2, 3)).astype(np.float32) / 255
        for value in mean:
            torch.ones(200_000 if len(self.done) % 3 == 0 else 10).sum()
            self.done.append(float(value))
        return RewardOutput(mean, {"mean": mean}, [[f"{value:.3f}"] for value in mean])


def pooled(parts, workers=2, **options):
    return {**parts, "reward": RewardPool(Slow(), workers=workers, mode="thread", batch_size=2, **options)}


def test_scores_are_those_of_the_pictures(parts):
    agent = tiny_agent(pooled(parts), overlap=2, prompts_per_update=4)
    rollout = agent.sample()
    expected = rollout.images.mean((1, 2, 3)) / 255
    np.testing.assert_allclose(rollout.scores.flatten(), expected, atol=1e-6)
    assert rollout.returns.shape == (4, 4, 1) and rollout.words_read == [[f"{value:.3f}"] for value in expected]
    assert agent.images_decoded == 16 and agent.tokens_sampled == 16 * 21
    canvas = agent.policy.tokenizer.blank(16)
    for t, grid in enumerate(rollout.grids):
        canvas = agent.policy.tokenizer.write(t, canvas, grid)
    assert (agent.policy.tokenizer.decode(canvas).numpy() == rollout.images).all()  # rows and pictures belong together


def test_same_prompts_in_the_same_order_as_in_one_piece(parts):
    prompts = []
    for overlap in (1, 2, 3, 9):
        rollout = tiny_agent(pooled(parts), overlap=overlap, prompts_per_update=4).sample()
        prompts.append([scene.prompt for scene in rollout.scenes])
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] and len(set(prompts[0])) > 1


def test_the_workers_do_not_matter(parts):
    agents = [tiny_agent(pooled(parts, workers), overlap=2, learning_rate=1e-3) for workers in (1, 3)]
    for agent in agents:
        agent.learn(3 * STEPS_A_ROLLOUT)
    assert_same(*(weights_of(agent.policy) for agent in agents), atol=0, rtol=0)


def test_prefixes_and_budgets(parts):
    agent = tiny_agent(pooled(parts), VMR, split=1, suffix_samples=2, overlap=2)
    rollout = agent.sample()
    assert rollout.scores.shape == (2, 4) and rollout.returns.shape == (2, 4, 2)
    np.testing.assert_allclose(rollout.returns.flatten(), rollout.images.mean((1, 2, 3)) / 255, atol=1e-6)
    agent = tiny_agent(pooled(parts), overlap=2).learn(10 * STEPS_A_ROLLOUT, StopAfter(images=16))
    assert (agent.n_updates, agent.images_decoded) == (2, 16)


def test_resumes_bit_for_bit(parts, tmp_path):
    options = {"overlap": 2, "learning_rate": 1e-3}
    whole = tiny_agent(pooled(parts), **options).learn(4 * STEPS_A_ROLLOUT)
    half = tiny_agent(pooled(parts), **options).learn(2 * STEPS_A_ROLLOUT)
    half.save(tmp_path / "half")
    resumed = GRPO.load(tmp_path / "half", half.env, "cpu")
    assert resumed.overlap == 2
    resumed.learn(2 * STEPS_A_ROLLOUT, reset_num_timesteps=False)
    assert_same(weights_of(whole.policy), weights_of(resumed.policy), atol=0, rtol=0)


def test_needs_a_pool(parts):
    with pytest.raises(RuntimeError, match=r"takes a RewardPool.*the environment has the reward 'brightness'"):
        tiny_agent(parts, overlap=2).sample()
    with pytest.raises(ValueError, match="overlap must be a whole number of at least 1, got 0"):
        tiny_agent(parts, overlap=0)


def test_a_reward_that_fails_ends_the_update(parts):
    class Broken(Slow):
        def score(self, images, scenes):
            raise RuntimeError("out of ink")

    agent = tiny_agent({**parts, "reward": RewardPool(Broken(), mode="thread")}, overlap=2)
    with pytest.raises(RuntimeError, match="out of ink"):
        agent.sample()
    assert agent.n_updates == 0
