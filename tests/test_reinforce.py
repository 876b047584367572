import itertools
import math

import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent

from agents import GRPO, PANW, REINFORCE, RLOO, load
from agents.losses import group_advantages, leave_one_out
from agents.registry import make

EVERYTHING = range(3)


def gradients_of(agent, rollout):
    """The gradient of an update as the agent makes it: its own advantages, its wrappers' weights."""
    core = agent.unwrapped
    rollout = core.judge(rollout, EVERYTHING)
    return gradients(core, rollout, core.outermost.token_advantages(rollout, EVERYTHING))


class TestREINFORCE:
    def test_gradient_matches_a_naive_loop(self, parts):
        agent = tiny_agent(parts, REINFORCE, kl_coef=0.0)
        rollout = agent.sample()
        fast = gradients_of(agent, rollout)
        agent.policy.zero_grad()
        total = torch.zeros(())
        for b in range(8):  # one sample, one token at a time
            cond = agent.policy.take(rollout.cond, torch.tensor([b]))
            logp = agent.policy(cond, [grid[b : b + 1] for grid in rollout.grids], EVERYTHING).log_softmax(-1)[0, :, 0]
            group = rollout.scores[b // 4]
            baseline = sum(group.tolist()) / 4
            for i, token in enumerate(torch.cat([grid[b] for grid in rollout.grids]).flatten().tolist()):
                total = total - (group[b % 4] - baseline) * logp[i, token] / 21 / 8
        total.backward()
        slow = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in agent.policy.named_parameters()}
        assert any(g.abs().max() > 0 for g in slow.values())
        assert_same(fast, slow, atol=1e-7, rtol=1e-3)

    @pytest.mark.parametrize("wrap", [lambda agent: agent, PANW], ids=["bare", "panw"])
    @pytest.mark.parametrize("options", [{}, {"micro_batch": 3, "entropy_coef": 0.1}], ids=str)
    def test_gradient_is_that_of_grpo_without_the_std(self, parts, options, wrap):
        found = []
        for cls, scale in ((REINFORCE, "none"), (GRPO, "none"), (GRPO, "group")):
            agent = wrap(tiny_agent(parts, cls, advantage_scale=scale, kl_coef=0.1, **options))
            nudge(agent.unwrapped)
            found.append(gradients_of(agent, agent.sample()))
        assert_same(found[0], found[1], atol=1e-7, rtol=1e-4)
        unscaled, scaled = (found[i]["head.weight"] for i in (0, 2))
        assert (unscaled - scaled).abs().max() > 0.1 * scaled.abs().max() > 0

    def test_of_one_group_it_is_grpos_times_the_std(self, parts):
        found = []
        for cls in (REINFORCE, GRPO):
            agent = tiny_agent(parts, cls, prompts_per_update=1, kl_coef=0.0)
            rollout = agent.sample()
            found.append(gradients_of(agent, rollout))
        std = rollout.scores.std().item() + 1e-4
        assert_same(found[0], {name: std * g for name, g in found[1].items()}, atol=1e-8, rtol=1e-3)

    @pytest.mark.parametrize("cls", [REINFORCE, RLOO])
    @pytest.mark.parametrize("options", [{"epochs": 2}, {"minibatches": 4}, {"advantage_scale": "group"}], ids=str)
    def test_refuses_what_is_not_reinforce(self, parts, cls, options):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=rf"{cls.__name__} .*{name}.* got '?{value}'?.* use GRPO"):
            tiny_agent(parts, cls, **options)

    def test_refuses_it_in_files_and_recipes_too(self, parts, tmp_path):
        agent = tiny_agent(parts, REINFORCE, prompts_per_update=2).learn(STEPS_A_ROLLOUT)
        agent.save(tmp_path / "agent")
        again = load(tmp_path / "agent.zip", device="cpu")
        assert type(again) is REINFORCE and again.advantage_scale == "none" and again.n_updates == 1
        with pytest.raises(ValueError, match="epochs=1, got 3"):
            load(tmp_path / "agent.zip", device="cpu", epochs=3)
        with pytest.raises(ValueError, match="epochs=1, got 3"):
            make("reinforce+panw", agent.env, agent.policy, epochs=3, device="cpu")


class TestRLOO:
    def test_advantage_is_the_reward_less_the_mean_of_the_others(self, parts):
        agent = tiny_agent(parts, RLOO)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        for b, advantage in enumerate(rollout.advantages.tolist()):
            group = rollout.scores[b // 4].tolist()
            mine = group.pop(b % 4)
            assert advantage == pytest.approx(mine - sum(group) / 3, abs=1e-6)

    @pytest.mark.parametrize("group_size", [2, 4])
    def test_gradient_is_reinforces_times_a_constant(self, parts, group_size):
        found = []
        for cls in (REINFORCE, RLOO):
            agent = tiny_agent(parts, cls, group_size=group_size, kl_coef=0.0)
            found.append(gradients_of(agent, agent.sample()))
        factor = group_size / (group_size - 1)
        assert_same({name: factor * g for name, g in found[0].items()}, found[1], atol=1e-7, rtol=1e-4)

    def test_is_unbiased_and_reinforce_shrinks(self):
        """All groups of 3 draws from two arms of probability p and 1 - p, and rewards 1 and 0."""
        p, size = 0.3, 3
        truth = p * (1 - p)  # the slope of the expected reward, p, in the logit of the first arm
        mean = {leave_one_out: 0.0, group_advantages: 0.0}
        for group in itertools.product((1.0, 0.0), repeat=size):
            chance = math.prod(p if reward else 1 - p for reward in group)
            score = [1 - p if reward else -p for reward in group]  # slope of log p
            for function in mean:
                options = {"scale": "none"} if function is group_advantages else {}
                advantages = function(torch.tensor([group], dtype=torch.float64), **options)[0].tolist()
                mean[function] += chance * sum(a * s for a, s in zip(advantages, score, strict=True)) / size
        assert mean[leave_one_out] == pytest.approx(truth)
        assert mean[group_advantages] == pytest.approx(truth * (size - 1) / size)

    def test_needs_others(self, parts):
        with pytest.raises(ValueError, match=r"group_size of at least 2.* got 1"):
            tiny_agent(parts, RLOO, group_size=1)
