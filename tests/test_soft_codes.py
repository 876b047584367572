"""Soft codes: against loops, against exact gradients by enumeration, and in an agent's update."""

import math

import pytest
import torch
from test_save_load import same
from test_theory_agents import all_images
from tiny import STEPS_A_ROLLOUT, assert_same, gradients, tiny_agent, tiny_envs, weights_of

from agents import GRPO, REINFORCE, CheckpointEvery, Checkpoints, StopAfter
from agents.policies.table import TablePolicy
from agents.soft_codes import draw_neighbours, log_kernel, neighbourhood_logp
from var_env import ScaleSchedule
from var_env.tabular import VARTabularVectorEnv
from var_env.tokenizers.bits import BitTokenizer

EVERY = range(3)
PAIRS = torch.full((4, 4), -torch.inf).masked_fill(torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)) > 0, 0.0)


def some_kernel(codes, seed=0, width=0.5):
    points = torch.randn(codes, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return log_kernel(torch.cdist(points, points).square(), width)


class TestKernel:
    def test_by_hand(self):
        """On a line at 0, 1, 3 and 7: the nearest are 1, 1, 4 and 16 away in squares, whose lower median is 1."""
        at = torch.tensor([0.0, 1.0, 3.0, 7.0])
        found = log_kernel((at[:, None] - at).square(), 0.5)
        torch.testing.assert_close(found[0], torch.tensor([0.0, -2.0, -18.0, -98.0]))
        assert torch.equal(found, found.T)

    def test_twins_have_no_unit(self):
        with pytest.raises(ValueError, match="more than half of the tokenizer's codes have a twin"):
            log_kernel(torch.zeros(4, 4), 0.5)

    def test_distances_of_bits_add_up(self):
        tokenizer = BitTokenizer(ScaleSchedule([(1, 1)], patch=16), bits=5, width=8, blocks=1)
        one, two = torch.randint(2, (2, 1, 1, 5), generator=torch.Generator().manual_seed(0))
        apart = tokenizer.code_distances()[one, two].sum()
        torch.testing.assert_close(apart, (tokenizer.embed(0, one) - tokenizer.embed(0, two)).square().sum())

    @pytest.mark.parametrize("codes", [1, 3])
    def test_the_log_probability_of_a_neighbourhood(self, codes):
        """Value by value; the kernel of a token of several codes is the product of theirs."""
        noise, kernel = torch.Generator().manual_seed(1), some_kernel(4)
        logp = torch.randn(2, 3, codes, 4, generator=noise, dtype=torch.float64).log_softmax(-1)
        chosen = torch.randint(4, (2, 3, codes), generator=noise)
        found = neighbourhood_logp(logp, chosen, kernel)
        for b in range(2):
            for i in range(3):
                total = 0.0
                for other in torch.cartesian_prod(*[torch.arange(4)] * codes).view(-1, codes).tolist():
                    k = math.prod(kernel[chosen[b, i, d], c].exp().item() for d, c in enumerate(other))
                    total += k * math.prod(logp[b, i, d, c].exp().item() for d, c in enumerate(other))
                assert found[b, i].item() == pytest.approx(math.log(total))

    def test_neighbours_are_drawn_from_it(self):
        kernel = some_kernel(4).float()
        grid = torch.full((1, 20_000, 1), 2)
        drawn = draw_neighbours(grid, kernel, torch.Generator().manual_seed(0))
        share = drawn.flatten().bincount(minlength=4) / 20_000
        torch.testing.assert_close(share, kernel[2].softmax(0), atol=0.015, rtol=0)  # four standard errors


class TestOneToken:
    """One token of four codes, all of them listed, in float64."""

    def gradients(self, kernel, advantages):
        """The expected gradient and the total variance of one sample's, for the plain and the soft log-probability."""
        logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
        found = []
        for soft in (False, True):
            logp = logits.log_softmax(0)
            values = neighbourhood_logp(logp.expand(4, 1, 1, 4), torch.arange(4).view(4, 1, 1), kernel)[:, 0]
            values = values if soft else logp
            rows = torch.stack([torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values])
            p, samples = logp.detach().exp()[:, None], advantages[:, None] * rows  # (4, 1), (4, 4)
            mean = (p * samples).sum(0)
            found.append((mean, (p * (samples - mean).square()).sum()))
        return found

    def test_exact_and_with_less_noise_where_neighbours_earn_the_same(self):
        advantages = torch.tensor([1.0, 1.0, -0.5, -0.5], dtype=torch.float64)
        (plain, noise), (soft, less) = self.gradients(PAIRS.double(), advantages)
        torch.testing.assert_close(soft, plain)
        assert plain.norm() > 0.1 and less < 0.8 * noise

    def test_biased_where_they_do_not(self):
        advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
        (plain, _), (soft, _) = self.gradients(PAIRS.double(), advantages)
        assert (soft - plain).norm() > 0.5 * plain.norm()
        assert soft[0] / soft[1] > 0 > plain[0] / plain[1]  # neighbours go the same way

    def test_what_it_is_in_general(self):
        """The gradient for the smoothed advantage; an advantage that is the same for all draws a little, too."""
        kernel = some_kernel(4)
        logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
        p, k = logits.softmax(0), kernel.exp()
        for advantages in (torch.tensor([1.0, -0.3, 0.2, 0.5], dtype=torch.float64), torch.ones(4).double()):
            smoothed = k.T @ (p * advantages / (k @ p))  # (4,)
            expected = p * (smoothed - (p * smoothed).sum())  # the softmax's gradient of sum_c p(c) smoothed(c)
            torch.testing.assert_close(self.gradients(kernel, advantages)[1][0], expected)
            assert expected.norm() > 1e-3


class TestManyTokens:
    """Two grids of four codes on VARTabular, every image listed."""

    def gradients(self, alike):
        """The exact gradient, and that of an agent with soft codes, in the logits of both grids.

        The reward tells only the pairs {0, 1} and {2, 3} apart. ``alike``: the second grid's tables do no more.
        """
        envs = VARTabularVectorEnv(1, grids=[[1, 1], [2, 2]], vocab_size=4)
        pair = torch.arange(4) // 2
        flat = torch.cartesian_prod(*[pair] * 5)
        reward = torch.randn(2, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
        envs.reward.table = reward[tuple(flat.T)].double().numpy()
        policy = TablePolicy(envs.tokenizer, spread=1.0, seed=1)
        if alike:
            policy.tables[1].data = policy.tables[1].data[2 * pair]
        agent = REINFORCE(policy, envs, group_size=4, prompts_per_update=1, kl_coef=0.0, soft_codes=0.5, device="cpu")
        agent._kernel = PAIRS
        rollout = all_images(agent)
        with torch.no_grad():
            logp, _ = policy.evaluate(rollout.cond, rollout.grids, range(2))
        p = logp.sum((1, 2)).exp()[:, None]  # (N, 1) of each image
        returns = rollout.scores.flatten()
        advantages = p * (returns - (p[:, 0] * returns).sum())[:, None] * len(p) * 5  # the loss is a mean over both
        found = gradients(agent, rollout, advantages.expand(-1, 5), range(2))
        tables = list(policy.tables)
        logp, _ = policy.evaluate(rollout.cond, rollout.grids, range(2))
        expected = torch.autograd.grad(-(logp.sum((1, 2)).exp() * returns).sum(), tables)
        return [found[f"tables.{t}"] for t in range(2)], expected

    def test_exact_where_reward_and_later_grids_do_not_tell_neighbours_apart(self):
        found, expected = self.gradients(alike=True)
        for mine, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, exact, atol=1e-6, rtol=1e-4)
            assert exact.norm() > 1e-2

    def test_biased_where_later_grids_do(self):
        """The last grid has none after it, and stays exact."""
        found, expected = self.gradients(alike=False)
        torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=1e-4)
        assert (found[0] - expected[0]).norm() > 0.05 * expected[0].norm()


class TestAgents:
    OPTIONS = {"soft_codes": 0.5, "learning_rate": 1e-3, "kl_coef": 0.1, "epochs": 2, "minibatches": 2}

    @pytest.mark.parametrize("depth", [1, 6])
    def test_ratio_of_neighbourhoods_and_kl_of_tokens(self, parts, depth):
        if depth > 1:
            torch.manual_seed(0)
            bits = BitTokenizer(parts["tokenizer"].schedule, depth, width=8, blocks=1).eval().requires_grad_(False)
            parts = parts | {"tokenizer": bits}
        agent, plain = tiny_agent(parts, **self.OPTIONS), tiny_agent(parts, kl_coef=0.1, epochs=2)
        rollout = agent.fill(agent.sample(), EVERY)
        rows = torch.arange(8)
        seen = agent.log_probs(agent.policy, rollout, rows, EVERY)
        bare = plain.log_probs(plain.policy, rollout, rows, EVERY)
        torch.testing.assert_close(seen.logp, bare.logp)
        assert (seen.soft > seen.logp).all() and torch.equal(seen.compared, seen.soft)
        torch.testing.assert_close(rollout.old_soft, seen.soft)
        torch.testing.assert_close(rollout.ref_logp, seen.logp)  # the reference is the policy still, and of tokens
        weights = agent.aggregate(agent.token_weights(rollout, EVERY), EVERY)
        _, tokens = agent.loss(rollout, rows, torch.ones(8), weights, rollout.old_soft, EVERY)
        torch.testing.assert_close(tokens.ratio, torch.ones(8, 21))
        behaviour = torch.cat([draw.logp for draw in rollout.draws], 1).sum(-1)
        torch.testing.assert_close(tokens.behaviour_gap, behaviour - bare.logp, atol=1e-5, rtol=0)

    def test_a_narrow_neighbourhood_is_the_token(self, parts):
        """The same update as without the option, up to rounding."""
        found = []
        for options in ({}, {"soft_codes": 1e-3}):
            agent = tiny_agent(parts, kl_coef=0.0, **options)
            rollout = agent.judge(agent.sample(), EVERY)
            found.append(gradients(agent, rollout, agent.token_advantages(rollout, EVERY)))
        assert_same(*found, atol=1e-6, rtol=1e-4)

    def test_goes_on_bit_for_bit(self, parts, tmp_path):
        whole = tiny_agent(parts, **self.OPTIONS).learn(2 * STEPS_A_ROLLOUT)
        tiny_agent(parts, **self.OPTIONS).learn(
            2 * STEPS_A_ROLLOUT, [CheckpointEvery(tmp_path, 1), StopAfter(updates=1)]
        )
        resumed = Checkpoints(tmp_path).load(tiny_envs(parts), "cpu")
        resumed.learn(resumed.steps_left, reset_num_timesteps=False)
        assert same(weights_of(resumed.policy), weights_of(whole.policy))
        whole.save(tmp_path / "agent")
        assert torch.equal(GRPO.load(tmp_path / "agent", device="cpu")._kernel, whole._kernel)

    @pytest.mark.parametrize("width", [0.0, -1.0, math.nan])
    def test_bad_widths(self, parts, width):
        with pytest.raises(ValueError, match=f"soft_codes must be above 0, got {width}"):
            tiny_agent(parts, soft_codes=width)

    def test_it_needs_the_whole_vocabulary(self, parts):
        with pytest.raises(
            ValueError, match=r"soft_codes=0\.5 needs all log-probabilities at once: leave out logit_ch"
        ):
            tiny_agent(parts, soft_codes=0.5, logit_chunk=4)
