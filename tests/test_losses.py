import math

import pytest
import torch

from agents import losses


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestGroupAdvantages:
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_matches_a_naive_loop(self, ddof):
        rewards, eps = randn(5, 4), 1e-3
        expected = torch.empty(5, 4)
        for p in range(5):
            group = rewards[p].tolist()
            mean = sum(group) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / (4 - ddof))
            for g in range(4):
                expected[p, g] = (group[g] - mean) / (std + eps)
        torch.testing.assert_close(losses.group_advantages(rewards, eps=eps, ddof=ddof), expected)

    def test_equal_groups_are_exactly_zero(self):
        # 0.1 * 3 has a mean that rounds off 0.1 in fp32: dividing by a tiny eps would not give zero.
        rewards = torch.tensor([[0.1] * 7, [-0.6] * 7, [0.0] * 6 + [1.0]])
        advantages = losses.group_advantages(rewards, eps=1e-12)
        assert (advantages[:2] == 0).all() and (advantages[2] != 0).all()
        assert losses.zero_variance(rewards).tolist() == [True, True, False]

    def test_invariant_to_shift_and_scale_and_sums_to_zero(self):
        rewards = randn(3, 8).double()
        advantages = losses.group_advantages(rewards, eps=0.0)
        torch.testing.assert_close(losses.group_advantages(3 * rewards + 5, eps=0.0), advantages)
        torch.testing.assert_close(advantages.sum(1), torch.zeros(3, dtype=torch.float64))

    def test_a_group_of_one_is_zero(self):
        assert (losses.group_advantages(torch.ones(3, 1)) == 0).all()

    def test_wrong_shape(self):
        with pytest.raises(ValueError, match="prompts, group size"):
            losses.group_advantages(torch.ones(4))


class TestLogProbs:
    def test_matches_a_naive_loop(self):
        logits, tokens = randn(2, 3, 2, 5), torch.randint(5, (2, 3, 2))
        support = torch.rand(2, 3, 2, 5) < 0.5
        support.scatter_(-1, tokens.unsqueeze(-1), True)
        for mask in (None, support):
            logp, entropy, full, _ = losses.log_probs(logits, tokens, mask)
            for b in range(2):
                for i in range(3):
                    want_logp = want_entropy = 0.0
                    for d in range(2):
                        inside = [v for v in range(5) if mask is None or mask[b, i, d, v]]
                        total = sum(math.exp(logits[b, i, d, v]) for v in inside)
                        p = {v: math.exp(logits[b, i, d, v]) / total for v in inside}
                        want_logp += math.log(p[int(tokens[b, i, d])])
                        want_entropy -= sum(q * math.log(q) for q in p.values())
                    assert logp[b, i].item() == pytest.approx(want_logp, abs=1e-5)
                    assert entropy[b, i].item() == pytest.approx(want_entropy, abs=1e-5)
            assert full.shape == logits.shape

    def test_support_gives_finite_gradients(self):
        logits = randn(1, 2, 1, 4).requires_grad_()
        support = torch.tensor([True, False, True, False]).expand(1, 2, 1, 4)
        logp, entropy, full, _ = losses.log_probs(logits, torch.zeros(1, 2, 1, dtype=torch.int64), support)
        reference = losses.log_probs(randn(1, 2, 1, 4, seed=1), torch.zeros(1, 2, 1, dtype=torch.int64), support)[2]
        (logp.sum() + entropy.sum() + losses.full_kl(full, reference).sum()).backward()
        assert torch.isfinite(logits.grad).all()
        assert (logits.grad[..., [1, 3]] == 0).all()  # nothing flows to codes outside the support


class TestRatioAndClip:
    sizes = (1, 4, 3)

    @pytest.mark.parametrize("level", losses.RATIO_LEVELS)
    def test_matches_a_naive_loop(self, level):
        logp, old = randn(2, 8), randn(2, 8, seed=1)
        ratio = losses.policy_ratio(logp, old, level, self.sizes)
        grid_of = [g for g, size in enumerate(self.sizes) for _ in range(size)]
        for b in range(2):
            for i in range(8):
                if level == "token":
                    chosen = [i]
                elif level == "grid":
                    chosen = [j for j in range(8) if grid_of[j] == grid_of[i]]
                else:
                    chosen = list(range(8))
                mean = sum((logp[b, j] - old[b, j]).item() for j in chosen) / len(chosen)
                assert ratio[b, i].item() == pytest.approx(math.exp(mean), rel=1e-4)

    def test_ratio_of_equal_policies_is_exactly_one(self):
        logp = randn(3, 8)
        for level in losses.RATIO_LEVELS:
            assert (losses.policy_ratio(logp, logp.clone(), level, self.sizes) == 1).all()

    def test_huge_log_ratios_stay_finite(self):
        assert torch.isfinite(losses.policy_ratio(torch.tensor([[500.0]]), torch.tensor([[-500.0]]))).all()

    def test_bad_options(self):
        with pytest.raises(ValueError, match="token, grid, sequence"):
            losses.policy_ratio(randn(1, 8), randn(1, 8), "image")
        with pytest.raises(ValueError, match="sum to 8"):
            losses.policy_ratio(randn(1, 8), randn(1, 8), "grid", (1, 4))

    def test_clipped_loss_matches_a_naive_loop(self):
        ratio, advantages = randn(6, 5).exp(), randn(6)
        loss = losses.clipped_loss(ratio, advantages, 0.2)
        for b in range(6):
            for i in range(5):
                r, a = ratio[b, i].item(), advantages[b].item()
                assert loss[b, i].item() == pytest.approx(-min(r * a, min(max(r, 0.8), 1.2) * a), rel=1e-5)
        per_token = losses.clipped_loss(ratio, advantages[:, None].expand(6, 5), 0.2)
        torch.testing.assert_close(per_token, loss)

    def test_gradient_at_ratio_one_is_reinforce(self):
        logp = randn(4, 5).requires_grad_()
        advantages = randn(4, seed=1)
        losses.clipped_loss(losses.policy_ratio(logp, logp.detach()), advantages, 0.2).sum().backward()
        torch.testing.assert_close(logp.grad, -advantages[:, None].expand(4, 5))

    @pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
    def test_no_gradient_past_the_clip(self, ratio, advantage):
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss = losses.clipped_loss(losses.policy_ratio(logp, torch.zeros(1, 1)), torch.tensor([advantage]), 0.2)
        loss.sum().backward()
        assert logp.grad.item() == 0


class TestKL:
    def test_formulas(self):
        logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -0.5]])
        r = ref - logp
        torch.testing.assert_close(losses.kl_estimate(logp, ref, "k1"), -r)
        torch.testing.assert_close(losses.kl_estimate(logp, ref, "k2"), r**2 / 2)
        torch.testing.assert_close(losses.kl_estimate(logp, ref, "k3"), r.exp() - 1 - r)
        with pytest.raises(ValueError, match="k1, k2, k3"):
            losses.kl_estimate(logp, ref, "k4")

    @pytest.mark.parametrize("kind", ["k1", "k3"])
    def test_unbiased(self, kind):
        logp, ref = randn(5).log_softmax(0), randn(5, seed=1).log_softmax(0)
        estimates = losses.kl_estimate(logp[None], ref[None], kind)[0]
        assert (logp.exp() * estimates).sum().item() == pytest.approx(self.naive(logp, ref), abs=1e-6)

    def test_full_matches_a_naive_loop(self):
        logp, ref = randn(2, 3, 2, 5).log_softmax(-1), randn(2, 3, 2, 5, seed=1).log_softmax(-1)
        kl = losses.full_kl(logp, ref)
        for b in range(2):
            for i in range(3):
                want = sum(self.naive(logp[b, i, d], ref[b, i, d]) for d in range(2))
                assert kl[b, i].item() == pytest.approx(want, abs=1e-5)

    @pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
    def test_zero_for_equal_policies_and_clamped_for_far_ones(self, kind):
        logp = randn(2, 3)
        assert (losses.kl_estimate(logp, logp, kind) == 0).all()
        far = losses.kl_estimate(torch.tensor([[-900.0]]), torch.tensor([[0.0]]), kind, clamp=5.0)
        near = losses.kl_estimate(torch.tensor([[-5.0]]), torch.tensor([[0.0]]), kind, clamp=5.0)
        assert torch.isfinite(far).all() and far.item() == pytest.approx(near.item())

    @staticmethod
    def naive(logp, ref):
        return sum(math.exp(p) * (p - q) for p, q in zip(logp.tolist(), ref.tolist(), strict=True))


class TestAggregation:
    SIZES = (1, 4, 3)

    @pytest.mark.parametrize("name", ["constant", "token_mean", "sequence_mean"])
    def test_the_mean_over_tokens_when_nothing_is_masked(self, name):
        values = randn(5, 8)
        weights = losses.AGGREGATIONS[name](losses.uniform_weights(5, self.SIZES), self.SIZES)
        torch.testing.assert_close((weights * values).sum(), values.mean())

    @pytest.mark.parametrize("name", list(losses.AGGREGATIONS))
    def test_matches_a_naive_loop(self, name):
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(5, 8, generator=generator) < 0.5
        mask[0] = False  # a row of which nothing is kept
        mask[1, 1:5] = False  # and a grid
        values = randn(5, 8)
        weights = losses.AGGREGATIONS[name](losses.uniform_weights(5, self.SIZES) * mask, self.SIZES)
        assert torch.isfinite(weights).all()
        assert (weights * values).sum().item() == pytest.approx(self.naive(name, values, mask), abs=1e-6)

    def naive(self, name, values, mask):
        kept = [
            [v for v, m in zip(row, on, strict=True) if m]
            for row, on in zip(values.tolist(), mask.tolist(), strict=True)
        ]
        if name == "constant":
            return sum(sum(row) / 8 for row in kept) / 5
        if name == "token_mean":
            return sum(map(sum, kept)) / sum(map(len, kept))
        if name == "sequence_mean":
            return sum(sum(row) / len(row) for row in kept if row) / 5
        assert name == "step_mean"
        total = 0.0
        for row, on in zip(values, mask, strict=True):
            for part, kept in zip(row.split(self.SIZES), on.split(self.SIZES), strict=True):
                total += part[kept].mean().item() if kept.any() else 0.0
        return total / 3 / 5

    def test_per_grid_matches_a_naive_loop(self):
        values, sizes = randn(3, 8), (1, 4, 3)
        sums = losses.per_grid(values, sizes)
        for b in range(3):
            start = 0
            for g, size in enumerate(sizes):
                assert sums[b, g].item() == pytest.approx(sum(values[b, start : start + size].tolist()), abs=1e-5)
                start += size
