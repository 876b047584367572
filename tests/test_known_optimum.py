"""Every registered agent finds the optimum of a world in which it is known, from the same start and within a budget.

A new agent is tried as soon as it is registered; what it needs beyond the common options goes into ``OPTIONS``.
"""

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from token_world import CODES, OPTIMUM, TARGET, new_policy, token_world, tokens_shown

from agents import Decoding, evaluate, make
from agents.registry import BUNDLES, VARIANTS, known, options_in
from var_env import VARTextVectorEnv

IMAGES = 1280  # the budget
PROMPTS = 16  # fresh ones, from the test split
OPTIONS = {
    "n": 1024,  # best of n: as many as there are images, since its policy stays uniform
    "prefix_updates": 1,  # one prefix token, four suffix tokens
    "suffix_updates": 3,
}
RECIPES = [
    *(name for name, part in known().items() if part.__module__.startswith("agents.")),  # not those of other tests
    *VARIANTS,
    *BUNDLES,
    "vmr+panw+mp",
]
CASES = [(recipe, {}) for recipe in RECIPES] + [  # and options that change what is learned from
    ("grpo", {"soft_codes": 0.5}),
    ("grpo+local", {"soft_codes": 0.5}),
    ("grpo", {"kl_per_update": 0.02, "learning_rate": 1e-3}),
    ("grpo", {"temperature_lr": 0}),
]


@pytest.fixture(scope="module")
def envs():
    return VARTextVectorEnv(2, **token_world())


def reward_of(policy, envs, **options):
    return evaluate(policy, envs, PROMPTS, seed=1, **options).scores.mean()


def test_the_reward_reads_the_tokens_from_the_image(envs):
    noise = torch.Generator().manual_seed(0)
    grids = [torch.randint(CODES, (8, size, 1), generator=noise) for size in envs.schedule.sizes]
    canvas = envs.tokenizer.blank(8)
    for t, grid in enumerate(grids):
        canvas = envs.tokenizer.write(t, canvas, grid)
    images = envs.tokenizer.decode(canvas).numpy()
    for grid, shown in zip(grids, tokens_shown(images, envs.tokenizer), strict=True):
        assert np.array_equal(grid.squeeze(-1).numpy(), shown)
    scenes = [envs.world.sample(np.random.default_rng(0))] * 8
    target = torch.tensor(np.concatenate(TARGET))
    right = [(row == target).float().mean().item() for row in torch.cat(grids, 1).squeeze(-1)]
    np.testing.assert_allclose(envs.reward(images, scenes).scores, right, atol=1e-6)


def test_the_best_image_scores_the_optimum(envs):
    envs.reset(seed=0)
    for grid in TARGET:
        _, rewards, *_ = envs.step(np.array([grid] * 2))
    assert rewards.tolist() == [OPTIMUM] * 2


def test_the_start_is_far_from_the_optimum(envs):
    policy = new_policy(envs.tokenizer)
    scores = evaluate(policy, envs, 200, seed=1).scores
    assert scores.mean() == pytest.approx(1 / CODES, abs=0.05)  # standard error 0.014
    assert reward_of(policy, envs, decoding=Decoding(temperature=0.0)) < 0.5
    assert reward_of(policy, envs, best_of=4) < 0.7  # choosing among a few is no shortcut


@pytest.mark.parametrize(("recipe", "options"), CASES, ids=["-".join([recipe, *options]) for recipe, options in CASES])
def test_reaches_the_optimum(recipe, options, envs):
    own = {name: value for name, value in OPTIONS.items() if name in options_in(recipe)}
    common = {"group_size": 16, "prompts_per_update": 2, "learning_rate": 1e-2, "kl_coef": 1e-3}
    policy = new_policy(envs.tokenizer)
    policy.sharpness.requires_grad_("temperature_lr" in options)
    agent = make(recipe, envs, policy, seed=0, device="cpu", **common | own | options)
    agent.set_logger(Logger(None, []))
    agent.learn(agent.timesteps(IMAGES))
    assert agent.images_decoded < 1.2 * IMAGES
    assert reward_of(agent.best_policy, envs, best_of=agent.best_of) > 0.9 * OPTIMUM
