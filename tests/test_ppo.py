import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from tiny import STEPS_A_ROLLOUT, assert_same, csv_logger, nudge, tiny_agent, tiny_envs, tiny_policy, weights_of

from agents import GRPO, PANW, PPO, MaskPropagation, load, make
from agents.conflict import ConflictProbe
from agents.evaluation import evaluate
from agents.policies.base import Policy
from agents.ppo import gae
from rewards.base import Reward, RewardOutput

EVERYTHING = range(3)
SIZES = (1, 4, 16)
MANY = {"prompts_per_update": 8, "group_size": 8}  # rows enough to learn a value from


class TestGAE:
    def random(self, batch=5, steps=4):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, batch, steps, generator=generator)

    @pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
    def test_is_the_sum_of_the_paper(self, gamma, gae_lambda):
        rewards, values = self.random()
        advantages, returns = gae(rewards, values, gamma, gae_lambda)
        for b in range(5):
            v = [*values[b].tolist(), 0.0]
            delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(4)]
            for t in range(4):
                expected = sum((gamma * gae_lambda) ** k * delta[t + k] for k in range(4 - t))
                assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
                assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-5)

    @pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5)])
    def test_is_sb3s(self, gamma, gae_lambda):
        rewards, values = self.random()
        space = spaces.Box(0, 1, (1,))
        buffer = RolloutBuffer(4, space, space, "cpu", gae_lambda, gamma, n_envs=5)
        for t in range(4):
            nothing = np.zeros((5, 1))
            start = np.full(5, t == 0)
            buffer.add(nothing, nothing, rewards[:, t].numpy(), start, values[:, t], torch.zeros(5))
        buffer.compute_returns_and_advantage(torch.full((5,), 7.0), np.ones(5, bool))  # the episodes end here
        advantages, returns = gae(rewards, values, gamma, gae_lambda)
        np.testing.assert_allclose(advantages.T.numpy(), buffer.advantages, atol=1e-5)
        np.testing.assert_allclose(returns.T.numpy(), buffer.returns, atol=1e-5)

    def test_with_a_perfect_value_no_grid_was_better_than_expected(self):
        rewards = torch.tensor([[0.0, 0.0, 0.3], [0.0, 0.0, 0.8]])
        advantages, returns = gae(rewards, rewards[:, -1:].expand(2, 3))
        assert torch.equal(advantages, torch.zeros(2, 3))
        torch.testing.assert_close(returns, rewards[:, -1:].expand(2, 3))


class TestAdvantages:
    def judged(self, parts, **options):
        agent = tiny_agent(parts, PPO, **options)
        with torch.no_grad():  # values that differ
            agent.critic.outer.weight.normal_(generator=torch.Generator().manual_seed(0))
        return agent, agent.judge(agent.sample(), EVERYTHING)

    def test_one_number_a_grid_and_normalised_over_the_grids_of_the_batch(self, parts):
        agent, rollout = self.judged(parts)
        assert rollout.advantages.shape == (8, 21)
        grids = rollout.advantages.split(SIZES, 1)
        assert all(torch.equal(grid, grid[:, :1].expand_as(grid)) for grid in grids)
        found = torch.stack([grid[:, 0] for grid in grids], 1)  # (B, T)
        values, raw, returns = agent.estimates(rollout)
        assert values.std() > 0.01 and torch.equal(returns, raw + values)
        torch.testing.assert_close(found, (raw - raw.mean()) / (raw.std() + 1e-4))
        assert torch.equal(agent.token_advantages(rollout, EVERYTHING), rollout.advantages)

    def test_without_a_critic_and_decay_they_are_the_centred_rewards(self, parts):
        agent = tiny_agent(parts, PPO, gae_lambda=1.0, advantage_scale="none")
        rollout = agent.judge(agent.sample(), EVERYTHING)  # the critic says 0
        expected = rollout.scores.flatten() - rollout.scores.mean()
        torch.testing.assert_close(rollout.advantages, expected[:, None].expand(8, 21))

    def test_the_critic_sees_the_state_before_each_grid(self, parts):
        agent = tiny_agent(parts, PPO)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        assert rollout.features.shape == (8, 3, 32) and not rollout.features.requires_grad
        torch.testing.assert_close(rollout.features[:4, 0], rollout.features[:1, 0].expand(4, -1))  # one prompt
        for t in EVERYTHING:
            hidden = agent.policy.hidden(rollout.cond, rollout.grids[:t], range(t, t + 1))
            torch.testing.assert_close(rollout.features[:, t], hidden.mean(1), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("micro_batch", [1, 3])
    def test_micro_batches_change_nothing(self, parts, micro_batch):
        found = []
        for cut in (None, micro_batch):
            agent, rollout = self.judged(parts, micro_batch=cut)
            agent.fit_critic(rollout)
            found.append({"advantages": rollout.advantages, **weights_of(agent.critic)})
        assert_same(*found, atol=1e-4, rtol=1e-3)

    def test_a_part_of_the_grids_cannot_be_judged(self, parts):
        agent = tiny_agent(parts, PPO)
        with pytest.raises(ValueError, match="all 3 grids"):
            agent.judge(agent.sample(), range(2))

    def test_a_policy_without_hidden_states(self, parts, monkeypatch):
        policy = tiny_policy(parts["tokenizer"])
        monkeypatch.setattr(type(policy), "hidden", Policy.hidden)
        with pytest.raises(NotImplementedError, match="VARTextPolicy has no hidden"):
            PPO(policy, tiny_envs(parts))
        GRPO(policy, tiny_envs(parts))


class ByPrompt(Reward):
    """Depends on the prompt alone, so that the state before any grid tells it."""

    name = "by_prompt"

    def score(self, images, scenes):
        return RewardOutput(np.array([len(scene.words[0]) % 2 for scene in scenes], np.float32))


class Constant(Reward):
    name = "constant"

    def score(self, images, scenes):
        return RewardOutput(np.full(len(images), 0.7, np.float32))


class TestCritic:
    def test_learns_what_the_prompt_tells(self, parts):
        agent = tiny_agent(parts | {"reward": ByPrompt()}, PPO, critic_learning_rate=1e-2, **MANY)
        with torch.no_grad():
            agent.policy.text.norm.weight.mul_(20)  # the tiny policy hardly hears the prompt
        rollout = agent.judge(agent.sample(), EVERYTHING)
        assert 0.1 < rollout.scores.mean() < 0.9
        for _ in range(30):
            agent.fit_critic(rollout)
        values, _, returns = agent.estimates(rollout)
        assert 1 - (returns - values).var() / returns.var() > 0.9

    def test_of_a_constant_reward_no_grid_is_better_than_another(self, parts):
        agent = tiny_agent(parts | {"reward": Constant()}, PPO, **MANY)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        before = agent.estimates(rollout)[1].abs().mean()
        for _ in range(15):
            agent.fit_critic(rollout)
        after = agent.estimates(agent.judge(agent.sample(), EVERYTHING))[1].abs().mean()
        assert before > 0.6 and after < 0.02

    def test_sends_no_gradient_into_the_policy_and_takes_none(self, parts):
        agent = tiny_agent(parts, PPO)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        policy, critic = weights_of(agent.policy), weights_of(agent.critic)
        agent.fit_critic(rollout)
        assert_same(weights_of(agent.policy), policy, atol=0, rtol=0)
        assert not torch.equal(agent.critic.outer.bias, critic["outer.bias"])
        critic = weights_of(agent.critic)
        GRPO.update(agent, rollout, rollout.advantages, EVERYTHING)
        assert_same(weights_of(agent.critic), critic, atol=0, rtol=0)

    def test_its_start_hangs_on_the_seed_alone(self, parts):
        torch.manual_seed(1)
        first = tiny_agent(parts, PPO, seed=5)
        torch.manual_seed(2)
        assert_same(weights_of(tiny_agent(parts, PPO, seed=5).critic), weights_of(first.critic), atol=0, rtol=0)
        assert not torch.equal(tiny_agent(parts, PPO, seed=6).critic.inner.weight, first.critic.inner.weight)


class TestLearning:
    def test_improves_the_reward(self, parts):
        agent = tiny_agent(parts, PPO, learning_rate=3e-3, kl_coef=0.0, **MANY)
        before = evaluate(agent.policy, agent.env, 64).means()["reward"]
        agent.learn(15 * 64 * 3)
        assert evaluate(agent.policy, agent.env, 64).means()["reward"] > before + 0.01  # the best is 0.015 above

    def test_logs(self, parts, tmp_path):
        agent = tiny_agent(parts, PPO)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(2 * STEPS_A_ROLLOUT)
        names, *rows = (line.split(",") for line in (tmp_path / "progress.csv").read_text().splitlines())
        first, second = ({n: float(v) for n, v in zip(names, row, strict=True) if v} for row in rows)
        assert {"train/value_loss", "train/explained_variance", "values/1_1x1", "values/3_4x4"} <= first.keys()
        assert first["values/2_2x2"] == 0 < second["values/2_2x2"] and first["train/explained_variance"] == 0
        assert first["train/ratio_min"] == 1 == second["train/ratio_max"]

    @pytest.mark.parametrize(
        "options", [{"epochs": 2, "minibatches": 2}, {"group_size": 1}, {"kl_in": "reward"}], ids=str
    )
    def test_options_of_grpo(self, parts, options):
        agent = tiny_agent(parts, PPO, **options)
        before = weights_of(agent.policy)
        agent.learn(1)
        after = weights_of(agent.policy)
        assert all(torch.isfinite(weight).all() for weight in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in after)

    def test_in_wrappers(self, parts):
        options = {"group_size": 4, "prompts_per_update": 2, "seed": 0, "device": "cpu"}
        policies = [tiny_policy(parts["tokenizer"]) for _ in range(2)]
        plain, wrapped = (
            make(recipe, tiny_envs(parts), policy, **options).learn(2 * STEPS_A_ROLLOUT)
            for recipe, policy in zip(("ppo", "ppo+panw+mp"), policies, strict=True)
        )
        assert [type(wrapper) for wrapper in wrapped.wrappers] == [PANW, MaskPropagation] and wrapped.n_updates == 2
        assert type(plain) is PPO
        assert any(not torch.equal(a, b) for a, b in zip(*(policy.parameters() for policy in policies), strict=True))

    def test_a_wrapper_shapes_what_the_critic_learns(self, parts):
        agent = tiny_agent(parts, PPO)
        agent.outermost = SimpleNamespace(scores=lambda rollout, steps: rollout.scores + 5)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        assert (agent.estimates(rollout)[2][:, -1] > 5).all()

    def test_the_probe_changes_nothing(self, parts):
        agents = [tiny_agent(parts, PPO, kl_coef=0.1) for _ in range(2)]
        agents[0].learn(2 * STEPS_A_ROLLOUT)
        agents[1].learn(2 * STEPS_A_ROLLOUT, ConflictProbe(every=1, prompts=2))
        for part in ("policy", "critic"):
            left, right = (weights_of(getattr(agent, part)) for agent in agents)
            assert_same(left, right, atol=0, rtol=0)


class TestFiles:
    OPTIONS = {"precision": "auto", "kl_coef": 0.1, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3}

    def moments(self, agent):
        states = {"policy": agent.optimizer, "critic": agent.critic_optimizer}
        return {
            f"{part}.{i}.{name}": value
            for part, optimizer in states.items()
            for i, entry in optimizer.state_dict()["state"].items()
            for name, value in entry.items()
        }

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, tmp_path):
        whole = PANW(tiny_agent(parts, PPO, **self.OPTIONS)).learn(4 * STEPS_A_ROLLOUT)
        half = PANW(tiny_agent(parts, PPO, **self.OPTIONS)).learn(2 * STEPS_A_ROLLOUT)
        half.save(tmp_path / "agent.zip")
        torch.manual_seed(12345)
        resumed = load(tmp_path / "agent.zip", tiny_envs(parts), device="cpu")
        assert_same(weights_of(resumed.critic), weights_of(half.critic), atol=0, rtol=0)
        resumed.learn(2 * STEPS_A_ROLLOUT, reset_num_timesteps=False)
        for part in ("policy", "critic"):
            assert_same(weights_of(getattr(resumed, part)), weights_of(getattr(whole, part)), atol=0, rtol=0)
        assert_same(self.moments(resumed), self.moments(whole), atol=0, rtol=0)

    def test_the_critics_learning_rate_can_be_replaced(self, parts, tmp_path):
        agent = tiny_agent(parts, PPO).learn(STEPS_A_ROLLOUT)
        agent.save(tmp_path / "agent.zip")
        loaded = PPO.load(tmp_path / "agent.zip", tiny_envs(parts), device="cpu", critic_learning_rate=1e-9)
        before = weights_of(loaded.critic)
        loaded.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        assert_same(weights_of(loaded.critic), before, atol=1e-6, rtol=0)

    def test_get_and_set_parameters(self, parts):
        agent, other = tiny_agent(parts, PPO).learn(STEPS_A_ROLLOUT), tiny_agent(parts, PPO, policy_seed=9, seed=1)
        other.set_parameters(agent.get_parameters())
        assert_same(weights_of(other.critic), weights_of(agent.critic), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("gae_lambda", math.nan),
        ("critic_learning_rate", 0.0),
        ("critic_epochs", 0),
        ("advantage_scale", "group"),
    ],
)
def test_bad_options(parts, option, value):
    with pytest.raises(ValueError, match=option):
        tiny_agent(parts, PPO, **{option: value})


def test_hidden_states_make_the_logits(parts):
    agent = tiny_agent(parts, PPO)
    nudge(agent)
    rollout = agent.sample()
    for steps in (EVERYTHING, range(1, 3), range(2, 3)):
        hidden = agent.policy.hidden(rollout.cond, rollout.grids, steps)
        assert torch.equal(agent.policy.logits(hidden, steps), agent.policy(rollout.cond, rollout.grids, steps))
    for t in EVERYTHING:
        changed = [*rollout.grids[:t], *((grid + 1) % 32 for grid in rollout.grids[t:])]
        hidden = agent.policy.hidden(rollout.cond, rollout.grids, EVERYTHING)
        until = agent.policy.schedule.slices[t].stop
        assert torch.equal(agent.policy.hidden(rollout.cond, changed, EVERYTHING)[:, :until], hidden[:, :until])
        assert until == 21 or not torch.equal(agent.policy.hidden(rollout.cond, changed, EVERYTHING), hidden)
