import math

import pytest
import torch
from tiny import assert_same, gradients, nudge, tiny_agent

from agents import GRPO, PANW, VMR
from agents.losses import group_advantages
from agents.panw import panw_weights
from var_env import ScaleSchedule

SIZES = (1, 4, 16)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.8, 1.0, 1.2])
@pytest.mark.parametrize("steps", [None, range(2), range(1, 3), range(2, 3)], ids=str)
def test_weights_are_the_formula(schedule, alpha, steps):
    weights = panw_weights(schedule, alpha, steps)
    sizes = [SIZES[t] for t in steps or range(3)]
    raw = [1 / n**alpha for n in sizes for _ in range(n)]  # eq. 9
    torch.testing.assert_close(weights, torch.tensor(raw) / math.fsum(raw))
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)


def test_alpha_0_is_the_token_mean_and_alpha_1_the_step_mean(schedule):
    assert torch.equal(panw_weights(schedule, 0.0), torch.full((21,), 1 / 21))
    per_step = [part.sum().item() for part in panw_weights(schedule, 1.0).split(SIZES)]
    assert per_step == pytest.approx([1 / 3] * 3)


def test_weights_of_the_papers_schedule():
    schedule = ScaleSchedule([(n, n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)])
    for alpha, last in ((0.0, 0.41), (1.0, 1 / 18)):  # 4096 of 10,084 tokens
        weights = panw_weights(schedule, alpha)
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert weights[schedule.slices[-1]].sum().item() == pytest.approx(last, abs=5e-3)


@pytest.mark.parametrize("steps", [range(3), range(2), range(1, 3)], ids=str)
def test_loss_is_a_weighted_sum_over_tokens(parts, steps):
    agent = PANW(tiny_agent(parts, kl_coef=0.3), alpha=0.6)
    nudge(agent.unwrapped)
    rollout = agent.sample()
    advantages = group_advantages(rollout.scores).flatten()
    weights = agent.token_weights(rollout, steps)
    loss, seen = agent.loss(rollout, torch.arange(8), advantages, agent.aggregate(weights, steps), None, steps)
    total = 0.0
    for b in range(8):
        norm, row, i = sum(SIZES[t] * SIZES[t] ** -0.6 for t in steps), 0.0, 0
        for t in steps:
            for _ in range(SIZES[t]):
                row += SIZES[t] ** -0.6 / norm * (seen.policy_loss[b, i] + 0.3 * seen.kl[b, i]).item()
                i += 1
        total += row / 8
    assert loss.item() == pytest.approx(total, abs=1e-5)


def test_alpha_0_learns_like_the_agent_inside(parts):
    found = []
    for wrap in (lambda agent: agent, lambda agent: PANW(agent, alpha=0.0)):
        agent = wrap(tiny_agent(parts, kl_coef=0.3))
        nudge(agent.unwrapped)
        rollout = agent.sample()
        found.append(gradients(agent.unwrapped, rollout, group_advantages(rollout.scores).flatten()))
    assert_same(*found, atol=1e-7, rtol=1e-5)


def test_updates_use_the_weights(parts):
    found = []
    for alpha in (0.0, 1.0):
        agent = PANW(tiny_agent(parts, kl_coef=0.3), alpha=alpha)
        rollout = agent.sample()
        found.append(gradients(agent.unwrapped, rollout, group_advantages(rollout.scores).flatten()))
    coarse, fine = (g["position"][[0, -1]].norm(dim=1) for g in (found[1], found[0]))
    assert coarse[0] > 3 * fine[0]  # the only token of the first grid: 1/3 against 1/21


def test_over_a_stage_of_vmr_the_weights_sum_to_one(parts):
    agent = PANW(tiny_agent(parts, VMR, split=2), alpha=0.8)
    weights = agent.token_weights(agent.sample(), range(2))
    assert weights.policy.shape == (8, 5)
    torch.testing.assert_close(weights.policy.sum(1), torch.ones(8))
    torch.testing.assert_close(weights.policy, weights.kl)


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_bad_alpha(parts, alpha):
    with pytest.raises(ValueError, match="alpha"):
        PANW(tiny_agent(parts, GRPO), alpha=alpha)
