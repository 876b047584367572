"""The learned temperatures apart from the weights: their rate, their clip, and files."""

import math
import warnings
from itertools import chain

import pytest
import torch
from test_save_load import optimizer_tensors, same
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

from agents import GRPO, CheckpointEvery, Checkpoints, StopAfter
from agents.parameter_groups import group_names
from agents.policies.table import TablePolicy
from agents.schedules import WarmupLinear
from var_env.tabular import TableTokenizer, table_schedule

OPTIONS = {"learning_rate": 1e-3, "epochs": 2, "minibatches": 2, "kl_coef": 0.1, "ema_decay": 0.5}
WHOLE = 3 * STEPS_A_ROLLOUT


def state_by_name(agent):
    """The optimiser's state by parameter, whatever the groups."""
    names = list(chain.from_iterable(group_names(agent.policy, agent.temperature_lr)))
    found = optimizer_tensors(agent).items()
    return {(names[int(number)], what): value for key, value in found for number, what in [key.split(".")]}


class TestGroups:
    def test_every_trainable_parameter_is_in_one_group(self, parts):
        policy = tiny_agent(parts).policy
        weights, temperatures = group_names(policy, 1e-3)
        assert temperatures == ["sharpness"]
        assert sorted(weights + temperatures) == sorted(group_names(policy, None)[0])
        policy.position.requires_grad_(False)
        assert "position" not in chain.from_iterable(group_names(policy, 1e-3))

    def test_a_policy_that_trains_no_temperatures(self):
        policy = TablePolicy(TableTokenizer(table_schedule([(1, 1), (2, 2)]), 2))
        assert policy.temperature_parameters == () and len(group_names(policy, None)) == 1
        assert len(GRPO(policy, None, device="cpu").optimizer.param_groups) == 1  # there is nothing to freeze
        with pytest.raises(ValueError, match=r"temperature_lr .* TablePolicy trains none .* leave it out"):
            GRPO(policy, None, temperature_lr=1e-3, device="cpu")


class TestClip:
    """One optimiser step on a gradient that is given."""

    def step(self, parts, temperatures, **options):
        agent = tiny_agent(parts, learning_rate=1e-3, **options)
        for weight in agent.policy.parameters():
            weight.grad = torch.full_like(weight, 0.5)
        agent.policy.sharpness.grad.fill_(temperatures)
        norm = agent.optimizer_step()
        return agent, norm, agent.policy.norm.weight.grad

    def test_the_temperatures_gradient_leaves_the_weights_alone(self, parts):
        agent, norm, small = self.step(parts, 0.0, temperature_lr=1e-3)
        _, other, large = self.step(parts, 1e6, temperature_lr=1e-3)
        assert norm == other and torch.equal(small, large)
        numbers = sum(weight.numel() for name, weight in agent.policy.named_parameters() if name != "sharpness")
        assert norm == pytest.approx(0.5 * math.sqrt(numbers))  # of the weights alone

    def test_none_clips_all_together(self, parts):
        (_, _, small), (agent, norm, large) = (self.step(parts, of, temperature_lr=None) for of in (0.0, 1e6))
        assert large.abs().max() < 1e-4 * small.abs().max()
        assert norm > 1e6 and len(agent.optimizer.param_groups) == 1

    def test_each_group_is_clipped_to_the_same_norm(self, parts):
        agent, _, _ = self.step(parts, 1e6, temperature_lr=1e-3, max_grad_norm=0.1)
        for group in agent.optimizer.param_groups:
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in group["params"]])
            torch.testing.assert_close(norm.item(), 0.1, rtol=1e-4, atol=0)
        assert agent.logger.name_to_value["train/temperature_grad_norm"] == pytest.approx(1e6 * math.sqrt(3))

    def test_weight_decay_takes_its_share_off(self, parts):
        first = weights_of(tiny_agent(parts).policy)
        plain, decayed = (weights_of(self.step(parts, 0.0, weight_decay=decay)[0].policy) for decay in (0.0, 0.5))
        for name, weight in first.items():
            if name != "sharpness":  # its learning rate is 0
                torch.testing.assert_close(decayed[name], plain[name] - 1e-3 * 0.5 * weight, rtol=1e-5, atol=1e-7)

    def test_a_gradient_that_is_not_finite_skips_the_step_of_both(self, parts):
        before = weights_of(tiny_agent(parts).policy)
        with pytest.warns(UserWarning, match="gradient norm of update 1 is nan"):
            agent, norm, _ = self.step(parts, math.nan, temperature_lr=1e-3)
        assert math.isnan(norm) and same(weights_of(agent.policy), before)


class TestLearning:
    def test_0_freezes_them_exactly(self, parts):
        agent = tiny_agent(parts, **OPTIONS)
        agent.policy.sharpness.data.fill_(1e-3)
        agent.ema.sharpness.data.fill_(1e-3)
        before = weights_of(agent.policy)
        agent.learn(2 * STEPS_A_ROLLOUT)
        for policy in (agent.policy, agent.ema):
            assert torch.equal(policy.sharpness, before["sharpness"])
        assert not torch.equal(agent.policy.head.weight, before["head.weight"])

    def test_rates_of_both_groups(self, parts):
        agent = tiny_agent(parts, learning_rate=1e-3, temperature_lr=WarmupLinear(1e-4, warmup=0.0))
        seen, step = [], agent.optimizer.step
        agent.optimizer.step = lambda *args: (
            step(*args),
            seen.append([group["lr"] for group in agent.optimizer.param_groups]),
        )
        agent.learn(2 * STEPS_A_ROLLOUT)
        assert seen == [[1e-3, 1e-4], [1e-3, 5e-5]]

    def test_they_alone_learn(self, parts):
        agent = tiny_agent(parts, learning_rate=0.0, temperature_lr=1e-4)
        before = weights_of(agent.policy)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # something was learned
            agent.learn(2 * STEPS_A_ROLLOUT)
        after = weights_of(agent.policy)
        assert [name for name in after if not torch.equal(before[name], after[name])] == ["sharpness"]

    def test_with_adapters(self, parts):
        pytest.importorskip("peft")
        agent = tiny_agent(parts, temperature_lr=1e-4, lora={"r": 2})
        assert group_names(agent.policy, 1e-3)[1] == ["sharpness"]
        agent.learn(STEPS_A_ROLLOUT)
        assert agent.policy.sharpness.abs().max() > 0


class TestFiles:
    @pytest.mark.parametrize("rate", [0.0, 1e-4, WarmupLinear(1e-4)], ids=str)
    def test_goes_on_bit_for_bit(self, parts, tmp_path, rate):
        options = OPTIONS | {"temperature_lr": rate}
        whole = tiny_agent(parts, **options).learn(WHOLE)
        tiny_agent(parts, **options).learn(WHOLE, [CheckpointEvery(tmp_path, 1), StopAfter(updates=1)])
        resumed = Checkpoints(tmp_path).load(tiny_envs(parts), "cpu")
        resumed.learn(resumed.steps_left, reset_num_timesteps=False)
        assert resumed.temperature_lr == rate and same(weights_of(resumed.policy), weights_of(whole.policy))
        assert same(optimizer_tensors(resumed), optimizer_tensors(whole))

    @pytest.mark.parametrize(("first", "second"), [(None, 1e-4), (1e-4, None)])
    def test_the_option_can_be_replaced(self, parts, tmp_path, first, second):
        agent = tiny_agent(parts, temperature_lr=first, **OPTIONS).learn(STEPS_A_ROLLOUT)
        agent.save(tmp_path / "agent")
        loaded = GRPO.load(tmp_path / "agent", tiny_envs(parts), "cpu", temperature_lr=second)
        assert len(loaded.optimizer.param_groups) == (1 if second is None else 2)
        assert same(state_by_name(loaded), state_by_name(agent))  # the moments moved with their parameters
        loaded.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
