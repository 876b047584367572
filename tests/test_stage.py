import csv
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, csv_logger, gradients, nudge, tiny_agent, tiny_envs, tiny_policy
from tiny import weights_of as weights_of_module

import agents
from agents import PANW, VMR, EntropyReward, MaskPropagation, SimilarityAdvantage, SimilarityKL
from agents.stage import (
    cosine_similarities,
    entropy_bonus,
    group_similarity,
    kl_weights,
    opposite_similarity,
    similarity_weights,
    top_rewarded,
)

EVERYTHING = range(3)
SIZES = (1, 4, 16)
NAN = math.nan


def naive_cosine(a, b):
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def naive_similarity(embeddings, advantages):
    """Eq. 6 in loops: (G, L, C) and (G, L) to (G, L)."""
    g, length, _ = embeddings.shape
    q, a = embeddings.double().tolist(), advantages.double().tolist()
    found = torch.zeros(g, length)
    for i in range(g):
        for t in range(length):
            above = below = 0.0
            for j in range(g):
                if a[i][t] * a[j][t] <= 0:
                    above += naive_cosine(q[i][t], q[j][t])
                    below += 1
            found[i, t] = above / below if below else NAN
    return found


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_zeros(values):
    return values.masked_fill(values.abs() < 0.3, 0.0)


class TestOppositeSimilarity:
    @pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 4), (3, 5, 1), (5, 4, 3), (8, 3, 16)], ids=str)
    @pytest.mark.parametrize("per_token", [False, True])
    def test_matches_a_double_loop_over_samples(self, shape, per_token):
        g, length, _ = shape
        for seed in range(3):
            embeddings = with_zeros(noise(*shape, seed=seed))
            advantages = with_zeros(noise(g, length if per_token else 1, seed=seed + 10))
            found = opposite_similarity(embeddings, advantages if per_token else advantages[:, 0])
            expected = naive_similarity(embeddings, advantages.expand(g, length))
            torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("per_token", [False, True])
    def test_prompts_do_not_mix(self, per_token):
        embeddings, advantages = noise(3, 4, 5, 6), noise(*(3, 4, 5)[: 3 if per_token else 2], seed=1)
        found = opposite_similarity(embeddings, advantages)
        for p in range(3):
            torch.testing.assert_close(found[p], opposite_similarity(embeddings[p], advantages[p]), equal_nan=True)

    def test_one_better_and_two_worse(self):
        embeddings = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[3.0, 0.0]]])
        similarity = opposite_similarity(embeddings, torch.tensor([2.0, -1.0, -1.0]))
        torch.testing.assert_close(similarity, torch.tensor([[0.5], [0.0], [1.0]]))  # (0 + 1) / 2; 0; 1
        torch.testing.assert_close(similarity_weights(similarity), torch.tensor([[0.25], [0.5], [0.0]]))

    def test_a_zero_advantage_is_opposite_to_all_and_to_itself(self):
        embeddings = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 1.0]]])
        similarity = opposite_similarity(embeddings, torch.tensor([0.0, 1.0, 2.0]))
        torch.testing.assert_close(similarity, torch.tensor([[0.0], [-1.0], [0.0]]))  # (1 - 1 + 0) / 3; -1; 0

    def test_without_an_opposite_it_is_undefined_and_nothing_is_weighed(self):
        similarity = opposite_similarity(noise(3, 4, 5), torch.tensor([0.1, 0.2, 0.3]))
        assert similarity.isnan().all()
        for variant in ("paper", "code"):
            assert (similarity_weights(similarity, variant) == 1).all()
        assert (kl_weights(similarity, a=0.2, b=0.3) == 1).all()

    def test_tiny_advantages_keep_their_signs(self):
        same = opposite_similarity(noise(2, 1, 3), torch.tensor([1e-30, 1e-30]))
        assert same.isnan().all()

    def test_a_vector_of_zeros_is_like_nothing(self):
        embeddings = torch.stack([torch.zeros(2, 3), torch.ones(2, 3)])
        assert (opposite_similarity(embeddings, torch.tensor([1.0, -1.0])) == 0).all()

    def test_cosines_are_symmetric_and_one_with_themselves(self):
        cosines = cosine_similarities(noise(2, 4, 3, 5))
        assert cosines.shape == (2, 3, 4, 4) and cosines.abs().max() <= 1
        torch.testing.assert_close(cosines, cosines.mT)
        torch.testing.assert_close(cosines.diagonal(0, -1, -2), torch.ones(2, 3, 4))

    @pytest.mark.parametrize("shape", [(3,), (4, 6), (5, 4), ()], ids=str)
    def test_advantages_of_another_shape(self, shape):
        with pytest.raises(ValueError, match="advantages must be"):
            opposite_similarity(noise(4, 5, 6), torch.zeros(shape))


class TestWeights:
    def test_from_0_to_1(self):
        weights = similarity_weights(opposite_similarity(noise(8, 6, 3), noise(8, seed=1)))
        assert 0 <= weights.min() < 0.4 and 0.6 < weights.max() <= 1
        assert similarity_weights(torch.tensor([[-1.0, 0.0, 1.0]])).tolist() == [[1.0, 0.5, 0.0]]

    def test_code_has_a_mean_of_one_in_each_group(self):
        similarity = opposite_similarity(noise(3, 8, 6, 3), noise(3, 8, seed=1))
        weights = similarity_weights(similarity, "code")
        torch.testing.assert_close(weights.mean((1, 2)), torch.ones(3))
        paper = similarity_weights(similarity)
        torch.testing.assert_close(weights / weights[:, :1, :1], paper / paper[:, :1, :1])

    def test_code_does_not_blow_up_the_rounding_of_zeros(self):
        assert (similarity_weights(torch.ones(2, 3), "code") == 0).all()
        assert similarity_weights(torch.tensor([[1.0, 1 - 6e-8]]), "code").max() < 0.1

    def test_kl_goes_from_a_to_a_plus_b(self):
        similarity = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, NAN]])
        assert kl_weights(similarity).tolist() == [[0.5, 0.75, 1.0, 1.0, 1.0, 1.0]]
        torch.testing.assert_close(kl_weights(similarity, 0.25, 2.0), torch.tensor([[0.25, 1.25, 2.25, 2.25, 2.25, 1]]))
        assert kl_weights(similarity, 1.0, 0.0).tolist() == [[1.0] * 6]

    def test_unknown_variant(self):
        with pytest.raises(ValueError, match="unknown variant 'mine': choose one of paper, code"):
            similarity_weights(torch.zeros(1, 1), "mine")


class TestEntropyBonus:
    rewards = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    entropy = torch.tensor([[NAN, 2.0, 4.0, NAN], [1.0, NAN, NAN, NAN]])  # of the best alone
    ref_entropy = torch.tensor([[NAN, 2.0, 2.0, NAN], [2.0, NAN, NAN, NAN]])

    def test_the_best_of_each_group_gain_by_their_gap(self):
        bonus = entropy_bonus(self.rewards, self.entropy, self.ref_entropy)
        torch.testing.assert_close(bonus, torch.tensor([[0.0, 0.4, 0.08, 0.0], [0.2, 0.0, 0.0, 0.0]]))
        one = entropy_bonus(self.rewards[0], self.entropy[0], self.ref_entropy[0], coef=1.0)
        torch.testing.assert_close(one, torch.tensor([0.0, 1.0, 0.2, 0.0]))

    def test_the_sign_of_the_gap_does_not_matter(self):
        swapped = entropy_bonus(self.rewards, self.ref_entropy, self.entropy)
        torch.testing.assert_close(swapped, entropy_bonus(self.rewards, self.entropy, self.ref_entropy))

    def test_code_centres_it_on_the_best_and_a_unique_best_gets_nothing(self):
        bonus = entropy_bonus(self.rewards, self.entropy, self.ref_entropy, variant="code")
        torch.testing.assert_close(bonus, torch.tensor([[0.0, 0.16, -0.16, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        assert bonus[1, 0] == 0

    def test_matches_a_naive_loop(self):
        rewards = noise(5, 6).round()  # many ties
        entropy, ref_entropy = noise(5, 6, seed=1) + 3, noise(5, 6, seed=2) + 3
        for variant in ("paper", "code"):
            expected = torch.zeros(5, 6)
            for p in range(5):
                best = [i for i in range(6) if rewards[p, i] == max(rewards[p].tolist())]
                for i in best:
                    expected[p, i] = 0.7 / (1 + (ref_entropy[p, i] - entropy[p, i]) ** 2)
                mean = expected[p].sum() / len(best)
                expected[p, best] -= mean if variant == "code" else 0.0
            torch.testing.assert_close(entropy_bonus(rewards, entropy, ref_entropy, 0.7, variant), expected)

    def test_unknown_variant(self):
        with pytest.raises(ValueError, match="unknown variant"):
            entropy_bonus(self.rewards, self.entropy, self.ref_entropy, variant="mine")


# On rollouts of the small world ---------------------------------------------------------------------------------------


def vmr_suffix(parts, **options):
    agent = tiny_agent(parts, VMR, split=1, **options)
    agent._n_updates = agent.prefix_updates  # the turn of the suffix
    assert agent.stage == "suffix"
    return agent


CASES = {
    "grpo": (tiny_agent, EVERYTHING),
    "vmr prefix": (lambda parts, **options: tiny_agent(parts, VMR, split=2, **options), range(2)),
    "vmr suffix": (vmr_suffix, range(1, 3)),
}
ON_CASES = pytest.mark.parametrize(("make", "steps"), CASES.values(), ids=list(CASES))


def compared(agent, rollout, row, steps, on):
    """The vectors of one row, (n, C), computed alone."""
    tokenizer, canvas, found = agent.policy.tokenizer, agent.policy.tokenizer.blank(1), []
    for t in range(steps.stop):
        grid = rollout.grids[t][row : row + 1]
        canvas = tokenizer.write(t, canvas, grid)
        if t in steps:
            found.append(tokenizer.codebook[grid[0, :, 0]] if on == "codes" else tokenizer.read(t, canvas)[0])
    return torch.cat(found)


def naive_on_rollout(agent, rollout, steps, on):
    g, found = rollout.scores.shape[1], []
    for start in range(0, len(rollout.scenes), g):
        embeddings = torch.stack([compared(agent, rollout, row, steps, on) for row in range(start, start + g)])
        advantages = rollout.advantages[start : start + g]
        advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand(-1, embeddings.shape[1])
        found.append(naive_similarity(embeddings, advantages))
    return torch.cat(found)  # (B, n)


class TestSimilarityWrappers:
    @ON_CASES
    @pytest.mark.parametrize("on", ["codes", "canvas"])
    def test_advantages_are_multiplied_with_the_naive_weights(self, parts, make, steps, on):
        agent = SimilarityAdvantage(make(parts), on=on)
        rollout = agent.judge(agent.sample(), steps)
        similarity = naive_on_rollout(agent.unwrapped, rollout, steps, on)
        expected = rollout.advantages[:, None] * (1 - similarity) / 2
        assert rollout.advantages.abs().min() > 0 and similarity.std() > 0.1
        torch.testing.assert_close(agent.token_advantages(rollout, steps), expected, atol=1e-6, rtol=1e-5)

    def test_code_weights(self, parts):
        agent = SimilarityAdvantage(tiny_agent(parts), variant="code")
        rollout = agent.judge(agent.sample(), EVERYTHING)
        raw = (1 - naive_on_rollout(agent.unwrapped, rollout, EVERYTHING, "codes")) / 2
        expected = rollout.advantages[:, None] * torch.cat([part / part.mean() for part in raw.split(4)])
        torch.testing.assert_close(agent.token_advantages(rollout, EVERYTHING), expected, atol=1e-6, rtol=1e-5)

    def test_signs_of_token_advantages_count_at_their_token(self, parts):
        agent = SimilarityAdvantage(tiny_agent(parts))
        rollout = replace(agent.sample(), advantages=noise(8, 21))
        weights = similarity_weights(naive_on_rollout(agent.unwrapped, rollout, EVERYTHING, "codes"))
        expected = rollout.advantages * weights
        torch.testing.assert_close(agent.token_advantages(rollout, EVERYTHING), expected, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("on", ["codes", "canvas"])
    def test_equal_images_of_opposite_advantage_teach_nothing(self, parts, on):
        agent = SimilarityAdvantage(tiny_agent(parts), on=on)
        rollout = agent.sample()
        same = [draw.take(torch.zeros(8, dtype=torch.int64)) for draw in rollout.draws]
        rollout = replace(rollout, draws=same, advantages=torch.tensor([1.0, -1.0, 2.0, -2.0] * 2))
        advantages = agent.token_advantages(rollout, EVERYTHING)
        torch.testing.assert_close(advantages, torch.zeros(8, 21), atol=1e-6, rtol=0)

    @ON_CASES
    @pytest.mark.parametrize("on", ["codes", "canvas"])
    def test_only_the_kl_is_weighed(self, parts, make, steps, on):
        agent = SimilarityKL(make(parts), a=0.25, b=0.5, on=on)
        rollout = agent.judge(agent.sample(), steps)
        before, after = agent.agent.token_weights(rollout, steps), agent.token_weights(rollout, steps)
        assert torch.equal(after.policy, before.policy) and torch.equal(after.entropy, before.entropy)
        clipped = (naive_on_rollout(agent.unwrapped, rollout, steps, on) + 1).clamp(0, 1)
        torch.testing.assert_close(after.kl, before.kl * (0.25 + 0.5 * clipped))
        assert after.kl.std() > 0

    def test_the_gradient_of_the_kl_is_weighed(self, parts):
        found = []
        for wrap in (lambda agent: agent, lambda agent: SimilarityKL(agent, a=0.5, b=0.0)):
            agent = wrap(tiny_agent(parts, kl_coef=0.3))
            nudge(agent.unwrapped)
            rollout = agent.judge(agent.sample(), EVERYTHING)
            found.append(gradients(agent.unwrapped, rollout, torch.zeros(8)))
        full, half = found
        assert_same(half, {name: gradient / 2 for name, gradient in full.items()}, atol=1e-7, rtol=1e-4)

    def test_a_group_of_one_learns_as_without(self, parts):
        agent = SimilarityAdvantage(SimilarityKL(tiny_agent(parts, kl_coef=0.1)))
        agent.unwrapped.group_size = 1  # no constructor takes it
        rollout = replace(agent.sample(), advantages=torch.ones(2))
        assert (agent.token_advantages(rollout, EVERYTHING) == 1).all()
        weights = agent.token_weights(rollout, EVERYTHING)
        assert torch.equal(weights.kl, weights.policy)
        assert not any("stage/similarity" in name for name in agent.logger.name_to_value)
        assert agent.logger.name_to_value["stage/kl_weight_3_4x4"] == 1

    def test_undefined_similarities_are_left_out_of_the_log(self, parts):
        agent = SimilarityAdvantage(tiny_agent(parts))
        rollout = replace(agent.sample(), advantages=torch.tensor([1.0] * 4 + [-1.0, 2.0, 1.0, 1.0]))
        similarity = group_similarity(agent.unwrapped, rollout, EVERYTHING)
        assert similarity[0].isnan().all()
        agent.token_advantages(rollout, EVERYTHING)
        logged = agent.logger.name_to_value["stage/similarity_1_1x1"]
        assert logged == pytest.approx(similarity[1, :, 0].mean().item(), abs=1e-6)

    def test_means_of_every_scale_are_logged(self, parts):
        agent = SimilarityAdvantage(SimilarityKL(tiny_agent(parts)))
        rollout = agent.judge(agent.sample(), EVERYTHING)
        similarity = group_similarity(agent.unwrapped, rollout, EVERYTHING).flatten(0, 1)
        agent.token_advantages(rollout, EVERYTHING)
        agent.token_weights(rollout, EVERYTHING)
        logged = agent.logger.name_to_value
        for name, part in zip(("1_1x1", "2_2x2", "3_4x4"), similarity.split(SIZES, 1), strict=True):
            assert logged[f"stage/similarity_{name}"] == pytest.approx(part.mean().item(), abs=1e-6)
            assert logged[f"stage/weight_{name}"] == pytest.approx((1 - part).mean().item() / 2, abs=1e-6)
            assert logged[f"stage/kl_weight_{name}"] == pytest.approx(kl_weights(part).mean().item(), abs=1e-6)


def row_entropy(agent, policy, rollout, row, steps):
    """Eqs. 9 and 10 for one row, from the policy's logits."""
    with torch.no_grad():
        grids = [grid[[row]] for grid in rollout.grids[: steps.stop]]
        logits = policy(policy.take(rollout.cond, torch.tensor([row])), grids, steps)[0, :, 0]  # (n, V)
    entropies = [-(p * p.log()).sum().item() for p in logits.double().softmax(-1)]
    return sum(entropies) / len(entropies)


class TestEntropyReward:
    @ON_CASES
    @pytest.mark.parametrize("variant", ["paper", "code"])
    def test_scores_are_the_naive_ones(self, parts, make, steps, variant):
        agent = EntropyReward(make(parts), entropy_reward=0.7, variant=variant)
        nudge(agent.unwrapped, 0.2)
        rollout = agent.sample()
        rewards = rollout.scores.clone()
        rewards[0] = torch.tensor([1.0, 2.0, 2.0, 2.0])  # ties at the top
        rollout = replace(rollout, scores=rewards)
        expected, gaps = rewards.clone(), []
        for p in range(2):
            best = [g for g in range(4) if rewards[p, g] == rewards[p].max()]
            bonus = []
            for g in best:
                policies = (agent.unwrapped.reference, agent.unwrapped.policy)
                reference, policy = (row_entropy(agent, one, rollout, 4 * p + g, steps) for one in policies)
                gaps.append(abs(reference - policy))
                bonus.append(0.7 / (1 + (reference - policy) ** 2))
            mean = sum(bonus) / len(bonus) if variant == "code" else 0.0
            for g, one in zip(best, bonus, strict=True):
                expected[p, g] += one - mean
        assert min(gaps) > 1e-3
        torch.testing.assert_close(agent.scores(rollout, steps), expected, atol=1e-5, rtol=0)
        gap = agent.logger.name_to_value["stage/entropy_gap"]
        assert gap == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)

    @pytest.mark.parametrize("micro_batch", [None, 1, 2])
    def test_only_the_best_rows_are_computed(self, parts, micro_batch, monkeypatch):
        agent = EntropyReward(tiny_agent(parts, micro_batch=micro_batch))
        rollout = replace(agent.sample(), scores=torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, 0.0, 0.0]]))
        original, seen = agent.unwrapped.log_probs, []

        def spy(policy, rollout, rows, steps):
            assert not torch.is_grad_enabled() and (micro_batch is None or len(rows) <= micro_batch)
            seen.append((policy is agent.unwrapped.reference, rows.tolist()))
            return original(policy, rollout, rows, steps)

        monkeypatch.setattr(agent.unwrapped, "log_probs", spy)
        agent.scores(rollout, EVERYTHING)
        for reference in (False, True):
            assert [row for which, rows in seen if which is reference for row in rows] == [1, 3, 4]

    def test_at_the_start_the_best_gain_the_coefficient_and_ties_stay_ties(self, parts):
        agent = EntropyReward(tiny_agent(parts))
        rollout = replace(agent.sample(), scores=torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 0.0, 0.5]]))
        scores = agent.scores(rollout, EVERYTHING)
        torch.testing.assert_close(scores, torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.0, 1.4, 0.0, 0.5]]))
        judged = agent.judge(rollout, EVERYTHING)
        assert (judged.advantages[:4] == 0).all() and (judged.advantages[4:] != 0).all()

    def test_the_best_are_the_best_by_reward(self, parts):
        agent = EntropyReward(tiny_agent(parts, kl_coef=100.0, kl_in="reward"))
        nudge(agent.unwrapped, 0.2)
        rollout = agent.sample()
        inner = agent.agent.scores(rollout, EVERYTHING)
        top = top_rewarded(rollout.scores)
        assert not torch.equal(top, top_rewarded(inner))
        assert torch.equal(agent.scores(rollout, EVERYTHING) > inner, top)

    def test_the_agent_gets_a_reference_if_it_has_none(self, parts):
        inner = tiny_agent(parts, kl_coef=0.0)
        assert inner.reference is None
        EntropyReward(inner)
        assert_same(weights_of_module(inner.reference), weights_of_module(inner.policy), atol=0, rtol=0)
        with_kl = tiny_agent(parts, kl_coef=0.1)
        reference = with_kl.reference
        assert EntropyReward(with_kl).reference is reference


class TestTogether:
    wraps = (
        SimilarityAdvantage,
        lambda agent: PANW(agent, alpha=0.6),
        SimilarityKL,
        MaskPropagation,
        EntropyReward,
    )

    @pytest.mark.parametrize("cls", [agents.GRPO, VMR])
    def test_the_order_of_wrappers_does_not_matter(self, parts, cls):
        found, steps = [], EVERYTHING if cls is agents.GRPO else range(2)
        for order in list(permutations(range(5)))[::17]:
            agent = tiny_agent(parts, cls, kl_coef=0.1, **({} if cls is agents.GRPO else {"split": 2}))
            for i in order:
                agent = self.wraps[i](agent)
            nudge(agent.unwrapped)
            rollout = agent.unwrapped.judge(agent.sample(), steps)
            weights = agent.unwrapped.outermost.token_weights(rollout, steps)._asdict()
            advantages = agent.unwrapped.outermost.token_advantages(rollout, steps)
            found.append(weights | {"scores": rollout.scores, "advantages": advantages})
        assert len(found) == 8
        for one in found[1:]:
            assert_same(one, found[0], atol=1e-7, rtol=1e-5)

    @pytest.mark.parametrize("recipe", ["stage", "vmr+stage", "vmr+panw+mp+stage", "stage+mp"])
    def test_learns_by_its_recipe(self, parts, recipe, tmp_path):
        options = {"split": 1, "prefix_updates": 1} if "vmr" in recipe else {}
        policy = tiny_policy(parts["tokenizer"])
        small = {"group_size": 4, "prompts_per_update": 2, "seed": 0, "device": "cpu", "learning_rate": 1e-2}
        agent = agents.make(recipe, tiny_envs(parts), policy, variant="code", on="canvas", **small, **options)
        ours = [wrapper for wrapper in agent.wrappers if type(wrapper).__module__ == "agents.stage"]
        assert [type(wrapper) for wrapper in ours] == [SimilarityAdvantage, SimilarityKL, EntropyReward]
        assert ours[0].variant == ours[2].variant == "code" and ours[0].on == ours[1].on == "canvas"
        agent.set_logger(csv_logger(tmp_path))
        before = weights_of_module(agent.policy)
        for _ in range(3):
            agent.iterate()
        agent.dump_logs()
        after = weights_of_module(agent.policy)
        assert all(weight.isfinite().all() for weight in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        with open(tmp_path / "progress.csv") as file:
            row = next(csv.DictReader(file))
        for name in ("weight", "similarity", "kl_weight"):
            assert math.isfinite(float(row[f"stage/{name}_1_1x1"]))
        assert float(row["stage/entropy_gap"]) >= 0

    def test_rewards_the_images_that_are_bright(self, parts):
        agent = agents.make(
            "stage",
            tiny_envs(parts),
            tiny_policy(parts["tokenizer"]),
            group_size=8,
            prompts_per_update=2,
            learning_rate=3e-3,
            seed=0,
            device="cpu",
        )
        first = agent.sample().returns
        agent.learn(20 * 2 * 8 * 3)
        assert agent.sample().returns.mean() > first.max()

    def test_resume_is_bit_for_bit_without_a_kl(self, parts, tmp_path):
        def fresh():
            agent = tiny_agent(parts, kl_coef=0.0, learning_rate=1e-3, epochs=2, minibatches=2)
            return EntropyReward(SimilarityKL(SimilarityAdvantage(agent, on="canvas"), a=0.3), entropy_reward=0.2)

        whole = fresh().learn(2 * STEPS_A_ROLLOUT)
        half = fresh().learn(STEPS_A_ROLLOUT)
        half.save(tmp_path / "agent")
        torch.manual_seed(12345)  # nothing may hang on global state
        resumed = agents.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
        assert str(resumed) == str(half) and "entropy_reward=0.2" in str(half) and "on='canvas'" in str(half)
        assert_same(weights_of_module(resumed.reference), weights_of_module(half.reference), atol=0, rtol=0)
        assert not torch.equal(resumed.reference.position, resumed.policy.position)
        resumed.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
        assert_same(weights_of_module(resumed.policy), weights_of_module(whole.policy), atol=0, rtol=0)
        assert_same(weights_of_module(resumed.reference), weights_of_module(whole.reference), atol=0, rtol=0)

    def test_micro_batches_leave_the_update_unchanged(self, parts):
        found = []
        for micro_batch in (None, 1, 3):
            agent = tiny_agent(parts, kl_coef=0.1, micro_batch=micro_batch)
            agent = EntropyReward(SimilarityKL(SimilarityAdvantage(agent)))
            nudge(agent.unwrapped)
            rollout = agent.judge(agent.sample(), EVERYTHING)
            advantages = agent.token_advantages(rollout, EVERYTHING)
            found.append(gradients(agent.unwrapped, rollout, advantages))
        for one in found[1:]:
            assert_same(one, found[0], atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize(
        ("wrap", "options", "message"),
        [
            (SimilarityAdvantage, {"variant": "mine"}, "unknown variant 'mine': choose one of paper, code"),
            (SimilarityAdvantage, {"on": "pixels"}, "unknown on 'pixels': choose one of codes, canvas"),
            (SimilarityKL, {"on": "pixels"}, "unknown on 'pixels'"),
            (SimilarityKL, {"a": -0.1}, "a must be a finite number of at least 0, got -0.1"),
            (SimilarityKL, {"b": math.inf}, "b must be a finite number of at least 0, got inf"),
            (EntropyReward, {"entropy_reward": -1.0}, "entropy_reward must be a finite number of at least 0"),
            (EntropyReward, {"entropy_reward": NAN}, "entropy_reward must be a finite number of at least 0, got nan"),
            (EntropyReward, {"variant": "mine"}, "unknown variant 'mine'"),
        ],
        ids=str,
    )
    def test_bad_options(self, parts, wrap, options, message):
        agent = tiny_agent(parts)
        with pytest.raises(ValueError, match=message):
            wrap(agent, **options)
        assert agent.outermost is agent  # and is not half wrapped
