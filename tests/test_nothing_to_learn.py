"""Runs that can learn nothing are refused, and those that learned nothing say so."""

import warnings

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, tiny_policy, weights_of

from agents import PANW, PPO, VMR, BestOfN, EntropyReward, SimilarityAdvantage, SimilarityKL, load
from agents.registry import VARIANTS, known, make
from rewards.base import Reward, RewardOutput

ALONE = ("ppo", "best_of_n")  # algorithms that compare no images of a prompt
OF_GROUPS = ("similarity", "similarity_kl", "entropy_reward")  # wrappers that do
RECIPES = [*known(), *VARIANTS, "stage", "vmr+panw+mp"]


class Constant(Reward):
    """Everything is worth the same."""

    name = "constant"

    def score(self, images, scenes):
        return RewardOutput(np.ones(len(images), np.float32))


def agent_of(recipe, parts, **options):
    policy = tiny_policy(parts["tokenizer"])
    return make(recipe, tiny_envs(parts), policy, prompts_per_update=2, seed=0, device="cpu", **options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_group_of_one(parts, recipe):
    if recipe in ALONE:
        assert agent_of(recipe, parts, group_size=1).group_size == 1
        return
    with pytest.raises(ValueError, match=r"group_size.* 1.*teaches nothing|group_size=1 is no multiple"):
        agent_of(recipe, parts, group_size=1)


@pytest.mark.parametrize("wrapper", [*OF_GROUPS, "stage"])
def test_wrappers_that_compare_a_group(parts, wrapper):
    with pytest.raises(ValueError, match=r"compares the images of a prompt.*got 1"):
        agent_of(f"ppo+{wrapper}", parts, group_size=1)
    assert {cls.min_group_size for cls in (SimilarityAdvantage, SimilarityKL, EntropyReward)} == {2}
    assert PANW(agent_of("ppo", parts, group_size=1)).min_group_size == 1


def test_counts_of_trees_and_prefixes(parts):
    with pytest.raises(ValueError, match="TreeGRPO compares"):
        agent_of("tree", parts, forks=(), branching=(1,), group_size=1)
    with pytest.raises(ValueError, match="VMR compares"):
        agent_of("vmr", parts, suffix_samples=4, group_size=1)
    assert agent_of("vmr", parts, suffix_samples=1, group_size=2).suffix_samples == 1


@pytest.mark.parametrize(("recipe", "name"), [("grpo", "GRPO"), ("ppo+similarity", "SimilarityAdvantage")])
def test_a_size_that_was_set_later(parts, tmp_path, recipe, name):
    agent_of(recipe, parts).save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=f"{name} compares"):
        load(tmp_path / "agent.zip", tiny_envs(parts), "cpu", group_size=1).learn(1)


@pytest.mark.parametrize("recipe", ["grpo", "reinforce", "rloo", "raft", "dapo", "vmr", "tree", "panw"])
def test_equal_rewards_all_along_are_told(parts, recipe):
    agent = agent_of(recipe, parts | {"reward": Constant()}, group_size=4)
    before = weights_of(agent.policy)
    with pytest.warns(UserWarning, match=rf"{agent.name} with seed 0 learned nothing.*zero_variance_groups"):
        agent.learn(2 * STEPS_A_ROLLOUT)
    assert agent.n_updates and all(torch.equal(weight, before[n]) for n, weight in agent.policy.named_parameters())


def test_a_learning_rate_of_zero_is_told(parts):
    with pytest.warns(UserWarning, match="learned nothing.*learning_rate"):
        tiny_agent(parts, learning_rate=0.0).learn(1)


@pytest.mark.parametrize(
    "run",
    [
        lambda parts: tiny_agent(parts).learn(1),
        lambda parts: tiny_agent(parts).learn(0),
        lambda parts: tiny_agent(parts, PPO, group_size=1).learn(1),
        lambda parts: tiny_agent(parts, VMR, split=2).learn(1),
        lambda parts: tiny_agent(parts, BestOfN).learn(100),
        lambda parts: tiny_agent(parts | {"reward": Constant()}, entropy_coef=0.1).learn(1),
    ],
    ids=["grpo", "no steps", "ppo", "vmr", "best of n", "an entropy bonus alone"],
)
def test_others_are_silent(parts, run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(parts)


def test_each_learn_is_judged_alone(parts):
    agent = tiny_agent(parts)
    agent.learn(1)
    agent.learning_rate = 0.0
    agent._setup_lr_schedule()
    with pytest.warns(UserWarning, match="all 1 optimiser steps"):
        agent.learn(1)
