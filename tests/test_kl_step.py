"""The learning rate that follows the KL of an update."""

import pytest
import torch
from test_save_load import optimizer_tensors, same
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

from agents import GRPO, PPO, VMR, CheckpointEvery, Checkpoints, StopAfter
from agents.kl_step import FACTOR, MOST, next_factor

OPTIONS = {"learning_rate": 1e-3, "kl_coef": 0.1, "kl_per_update": 1e-3}


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.021, 2 / FACTOR), (0.02, 2), (0.01, 2), (0.005, 2), (0.0049, 2 * FACTOR), (0.0, 2)],
)
def test_the_rule(kl, expected):
    assert next_factor(2.0, kl, 0.01) == pytest.approx(expected)


def test_it_has_ends():
    up = down = 1.0
    for _ in range(30):
        up, down = next_factor(up, 1e-9, 1.0), next_factor(down, 1e9, 1.0)
    assert (up, down) == (MOST, 1 / MOST)


def learned(agent, updates):
    """The learning rate and the KL of each of the next updates."""
    seen, update = [], agent.update

    def spy(*args):
        update(*args)
        found = agent.logger.name_to_value
        rates = [group["lr"] for group in agent.optimizer.param_groups]
        assert found["train/learning_rate"] == rates[0]
        seen.append((*rates, found.get("train/update_kl")))

    agent.update = spy
    agent.learn(updates * STEPS_A_ROLLOUT, log_interval=None)
    del agent.update
    return seen


@pytest.mark.parametrize("start", [2e-5, 3e-2])
def test_the_kl_comes_near_the_target(parts, start):
    agent = tiny_agent(parts, **OPTIONS | {"learning_rate": start, "temperature_lr": 0, "kl_coef": 0.0})
    found = learned(agent, 25)
    kls = [kl for *_, kl in found[-6:]]
    first = found[0][-1]
    assert not 0.1 < first / 1e-3 < 10  # far from it in the beginning
    middle = sorted(kls)[3]
    assert 0.25 < middle / 1e-3 < 4
    assert found[1][0] == pytest.approx(start * (FACTOR if start < 1e-3 else 1 / FACTOR))


def test_the_kl_is_that_of_all_tokens_before_and_after(parts):
    agent = tiny_agent(parts, **OPTIONS)
    rollout = agent.judge(agent.sample(), range(3))
    with torch.no_grad():
        before = agent.policy(rollout.cond, rollout.grids, range(3)).log_softmax(-1)  # (8, 21, 1, 32)
    agent.update(rollout, agent.token_advantages(rollout, range(3)), range(3))
    with torch.no_grad():
        after = agent.policy(rollout.cond, rollout.grids, range(3)).log_softmax(-1)
    chosen = torch.cat(rollout.grids, 1).unsqueeze(-1)
    moved = (after - before).gather(-1, chosen).double()
    expected = (moved.exp() - 1 - moved).mean().item()
    assert agent.logger.name_to_value["train/update_kl"] == pytest.approx(expected, rel=1e-2)
    assert expected > 0


def test_both_groups_follow(parts):
    found = learned(tiny_agent(parts, **OPTIONS | {"learning_rate": 1e-6, "temperature_lr": 1e-7}), 3)
    assert [weights / temperatures for weights, temperatures, _ in found] == pytest.approx([10] * 3)
    assert found[2][0] == pytest.approx(1e-6 * FACTOR**2)


def test_without_the_option_nothing_is_measured(parts):
    agent = tiny_agent(parts, learning_rate=1e-3)
    assert [entry[-1] for entry in learned(agent, 2)] == [None, None] and agent.lr_factor == 1.0


@pytest.mark.parametrize(
    ("cls", "more"), [(GRPO, {"epochs": 2, "minibatches": 2}), (GRPO, {"soft_codes": 0.5}), (PPO, {}), (VMR, {})]
)
def test_goes_on_bit_for_bit(parts, tmp_path, cls, more):
    def an_agent():
        return tiny_agent(parts, cls, **OPTIONS | more)

    steps = an_agent().timesteps(images=32)
    whole = an_agent().learn(steps)
    an_agent().learn(steps, [CheckpointEvery(tmp_path, 1), StopAfter(updates=2)])
    resumed = Checkpoints(tmp_path).load(tiny_envs(parts), "cpu")
    assert resumed.lr_factor != 1.0 or cls is VMR
    resumed.learn(resumed.steps_left, reset_num_timesteps=False)
    assert resumed.lr_factor == whole.lr_factor != 1.0
    assert same(weights_of(resumed.policy), weights_of(whole.policy))
    assert same(optimizer_tensors(resumed), optimizer_tensors(whole))
