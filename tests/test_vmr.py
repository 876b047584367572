import itertools
import math

import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, nudge, tiny_agent, weights_of

from agents import GRPO, VMR
from agents.callbacks import StopAfter
from agents.losses import group_advantages
from agents.vmr import middle_return


class TestMiddleReturn:
    """Eq. 10."""

    @pytest.mark.parametrize("eta", [0.1, 1.0, 7.0])
    def test_is_the_formula(self, eta):
        returns = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = middle_return(returns, eta)
        assert values.shape == (3, 4)
        for p, g in itertools.product(range(3), range(4)):
            mean = sum(math.exp(r / eta) for r in returns[p, g].tolist()) / 5
            assert values[p, g].item() == pytest.approx(eta * math.log(mean), rel=1e-12)

    def test_tends_to_the_maximum_and_to_the_mean(self):
        returns = torch.tensor([[-0.6, 1.25, 2.0], [0.3, 0.1, 0.2]])
        for eta in (1e-3, 1e-30):
            torch.testing.assert_close(middle_return(returns, eta), returns.max(-1).values, atol=2e-3, rtol=0)
        for eta in (1e3, 1e9, 1e30):
            torch.testing.assert_close(middle_return(returns, eta), returns.mean(-1), atol=1e-3, rtol=0)
        etas = [middle_return(returns, eta) for eta in (0.01, 0.1, 1.0, 10.0)]
        assert all((a > b).all() for a, b in itertools.pairwise(etas))  # a larger eta is less hopeful

    def test_of_one_return_or_of_equal_ones_is_the_return_exactly(self):
        returns = torch.tensor([0.1, -0.6, 1.7])
        for eta in (1e-9, 1.0, 1e9):
            assert torch.equal(middle_return(returns[:, None], eta), returns)
            assert torch.equal(middle_return(returns[:, None].expand(3, 4), eta), returns)

    def test_large_returns_do_not_overflow(self):
        assert middle_return(torch.tensor([1e4, -1e4]), 1.0).item() == pytest.approx(1e4 - math.log(2))

    @pytest.mark.parametrize("eta", [0.0, -1.0, math.inf, math.nan])
    def test_bad_eta(self, eta):
        with pytest.raises(ValueError, match="eta"):
            middle_return(torch.zeros(2), eta)


class TestVanilla:
    def test_without_a_suffix_is_grpo_exactly(self, parts):
        options = {"kl_coef": 0.1, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3, "precision": "auto"}
        plain = tiny_agent(parts, GRPO, **options).learn(3 * STEPS_A_ROLLOUT)
        two_stage = tiny_agent(parts, VMR, split=3, suffix_samples=1, **options).learn(3 * STEPS_A_ROLLOUT)
        assert_same(weights_of(two_stage.policy), weights_of(plain.policy), atol=0, rtol=0)
        assert two_stage.timesteps(80) == plain.timesteps(80) == 240

    def test_loss_and_gradient_are_grpo_s_exactly(self, parts):
        found = []
        for cls, options in ((GRPO, {}), (VMR, {"split": 3, "suffix_samples": 1})):
            agent = tiny_agent(parts, cls, kl_coef=0.3, **options)
            nudge(agent)
            rollout = agent.sample()
            advantages = group_advantages(rollout.scores).flatten()
            found.append(gradients(agent, rollout, advantages))
            shares = agent.aggregate(agent.token_weights(rollout, range(3)), range(3))
            loss, _ = agent.loss(rollout, torch.arange(8), advantages, shares, None, range(3))
            found.append({"loss": loss})
        assert_same(found[0], found[2], atol=0, rtol=0)
        assert_same(found[1], found[3], atol=0, rtol=0)


class TestStages:
    """P = 2, G = 4; the prefix is the first 1 or 2 of 3 grids (1, 4 and 16 tokens)."""

    def test_prefix_rollout(self, parts):
        agent = tiny_agent(parts, VMR, split=2, suffix_samples=3, eta=0.5)
        rollout = agent.sample()
        assert agent.stage == "prefix" and rollout.scores.shape == (2, 4) and rollout.returns.shape == (2, 4, 3)
        assert [grid.shape for grid in rollout.grids] == [(8, 1, 1), (8, 4, 1)]  # no suffix to learn from by mistake
        assert len(rollout.images) == len(rollout.regions) == 24
        assert torch.equal(rollout.scores, middle_return(rollout.returns, 0.5))
        assert agent.images_decoded == 24 and agent.tokens_sampled == 8 * 5 + 24 * 16
        assert agent.num_timesteps == 8 * 2 + 24

    def test_suffix_rollout(self, parts):
        agent = tiny_agent(parts, VMR, split=2, prefix_updates=1)
        agent.iterate()
        assert agent.stage == "suffix"
        before = agent.num_timesteps
        rollout = agent.sample()
        assert rollout.scores.shape == (2, 4) and rollout.suffixes == 1 and len(rollout.grids) == 3
        for grid in rollout.grids[:2]:  # one prefix a prompt
            assert torch.equal(grid, grid.unflatten(0, (2, 4))[:, :1].expand(-1, 4, -1, -1).flatten(0, 1))
        assert len(torch.unique(rollout.grids[2], dim=0)) > 2
        assert agent.num_timesteps - before == 2 * 2 + 8

    @pytest.mark.parametrize("stage", ["prefix", "suffix"])
    def test_gradients_stay_in_their_stage(self, parts, stage):
        """With a policy that is one free table of logits a scale, each scale's gradient stands alone."""
        agent = tiny_agent(parts, VMR, split=2, prefix_updates=1, kl_coef=0.1)
        if stage == "suffix":
            agent.iterate()
        policy, schedule = agent.policy, agent.policy.schedule
        tables = [torch.zeros(n, 1, 32, requires_grad=True) for n in schedule.sizes]
        rows, steps = 8, range(2) if stage == "prefix" else range(2, 3)
        policy.forward = lambda cond, grids, steps: torch.cat([tables[t] for t in steps]).expand(
            len(cond[0]), -1, -1, -1
        )
        rollout = agent.sample()
        assert len(rollout.scenes) == rows
        agent.update = lambda rollout, advantages, learned: setattr(agent, "asked", (advantages, learned))
        agent.sample = lambda: rollout
        agent.iterate()
        advantages, learned = agent.asked
        assert learned == steps
        weights = agent.token_weights(rollout, learned)
        loss, _ = agent.loss(rollout, torch.arange(rows), advantages, agent.aggregate(weights, learned), None, learned)
        loss.backward()
        for t, table in enumerate(tables):
            assert (table.grad is not None and table.grad.abs().max() > 0) == (t in steps)

    def test_prefix_update_computes_no_token_of_the_suffix(self, parts):
        agent = tiny_agent(parts, VMR, split=1, kl_coef=0.1)
        lengths = []
        forward = agent.policy.from_features
        agent.policy.from_features = lambda c, features, steps: (
            lengths.append(features.shape[1]) or forward(c, features, steps)
        )
        agent.iterate()
        assert lengths == [1]  # of 21 tokens

    def test_advantages_compare_the_prefixes_of_a_prompt(self, parts):
        agent = tiny_agent(parts, VMR, split=1, suffix_samples=2)
        rollout = agent.sample()
        agent.sample = lambda: rollout
        agent.update = lambda rollout, advantages, steps: setattr(agent, "asked", advantages)
        agent.iterate()
        for p in range(2):
            values = torch.tensor([math.log((a.exp() + b.exp()) / 2) for a, b in rollout.returns[p].double()])
            expected = (values - values.mean()) / (values.std() + agent.advantage_eps)
            torch.testing.assert_close(agent.asked.view(2, 4)[p], expected.float(), atol=1e-4, rtol=1e-4)

    def test_zero_variance_is_that_of_the_values(self, parts, reward):
        agent = tiny_agent(parts, VMR, split=1, suffix_samples=2)
        rollout = agent.sample()
        rollout.scores[:] = 0.5
        assert rollout.summary()["zero_variance_groups"] == 1


class TestAlternation:
    def stages(self, agent, updates):
        seen = []
        while len(seen) < updates:
            seen.append(agent.stage[0])
            agent.iterate()
        return "".join(seen)

    def test_fine(self, parts):
        assert self.stages(tiny_agent(parts, VMR, split=1), 9) == "pppspppsp"
        assert self.stages(tiny_agent(parts, VMR, split=1, prefix_updates=1, suffix_updates=2), 6) == "psspss"

    @pytest.mark.parametrize("cycles", [1, 3])
    def test_coarse_is_in_proportion_to_the_run(self, parts, cycles):
        class Watched(VMR):
            def iterate(self):
                seen.append(self.stage[0])
                super().iterate()

        seen = []
        agent = tiny_agent(parts, Watched, split=1, alternation="coarse")
        images = cycles * (3 * 16 + 8)
        agent.learn(agent.timesteps(images), StopAfter(images=images))
        assert "".join(seen) == "ppp" * cycles + "s" * cycles
        assert agent.images_decoded == images

    @pytest.mark.parametrize("split", [1, 2])
    def test_timesteps_are_those_of_so_many_images(self, parts, split):
        agent = tiny_agent(parts, VMR, split=split, suffix_samples=3)
        for _ in range(4):
            agent.iterate()
        assert agent.timesteps(agent.images_decoded) == agent.num_timesteps


class TestOptions:
    @pytest.mark.parametrize(("split", "m"), [(2, 2), (16, 1), ("m_32", 2)])  # 1x1, 2x2 and 4x4 at 16 px a token
    def test_split_by_number_or_resolution(self, parts, split, m):
        assert tiny_agent(parts, VMR, split=split).split == m

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": 3}, "leaves no suffix"),
            ({"split": 0}, "0"),
            ({"split": "m_33"}, "33"),
            ({"split": 1, "suffix_samples": 0}, "suffix_samples"),
            ({"split": 1, "eta": 0.0}, "eta"),
            ({"split": 1, "prefix_updates": 0}, "prefix_updates"),
            ({"split": 1, "alternation": "often"}, r"'often'.*fine, coarse"),
        ],
    )
    def test_bad_options(self, parts, options, message):
        with pytest.raises(ValueError, match=message):
            tiny_agent(parts, VMR, **options)

    def test_splits_in_the_middle_unless_told(self, parts):
        assert tiny_agent(parts, VMR).split == 2  # 32 of 64 pixels

    def test_says_what_it_is(self, parts):
        assert str(tiny_agent(parts, VMR, split="m_32")) == "VMR(split=2, suffix_samples=2, eta=1.0)"
        assert str(tiny_agent(parts)) == "GRPO()"

    def test_learns_with_guidance_truncation_and_several_steps(self, parts):
        from agents import Decoding

        options = {"decoding": Decoding(top_k=4, guidance=2.0), "support": "sampler", "epochs": 2, "micro_batch": 3}
        agent = tiny_agent(parts, VMR, split=1, prefix_updates=1, learning_rate=1e-4, **options)
        before = weights_of(agent.policy)
        agent.iterate()
        agent.iterate()
        after = weights_of(agent.policy)
        assert all(torch.isfinite(weight).all() for weight in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in after)


class TestSuffixKL:
    def test_is_taken_off_the_returns(self, parts):
        """Summed over the suffix's tokens, with a naive sum for reference."""
        plain, paying = (tiny_agent(parts, VMR, split=2, suffix_kl_coef=c) for c in (0.0, 0.5))
        for agent in (plain, paying):
            nudge(agent)
        before, after = plain.collect(3), paying.collect(3)
        rollout = plain.draw(0, 4, (2, 2))
        kl = paying.suffix_kl(rollout, 2)
        with torch.no_grad():
            mine, ref = (
                policy.evaluate(rollout.cond, rollout.grids, range(2, 3))[0].sum((1, 2))
                for policy in (paying.policy, paying.reference)
            )
        torch.testing.assert_close(kl.flatten(), mine - ref, atol=1e-4, rtol=1e-4)
        assert before.returns.shape == after.returns.shape and not torch.equal(before.returns, after.returns)

    def test_below_zero(self, parts):
        with pytest.raises(ValueError, match="suffix_kl_coef must be at least 0, got -1"):
            tiny_agent(parts, VMR, split=2, suffix_kl_coef=-1)
