"""GRPO's options, each against a naive reference."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_save_load import same
from tiny import STEPS_A_ROLLOUT, assert_same, csv_logger, gradients, nudge, tiny_agent, tiny_envs, weights_of

from agents import GRPO, PANW, VMR, MaskPropagation, StopAfter, Wrapper, logs, losses
from agents.callbacks import AgentCallback
from agents.rollout import Rollout
from agents.vmr import middle_return
from rewards.base import Reward, RewardOutput

SIZES = (1, 4, 16)
GRID_OF = [t for t, n in enumerate(SIZES) for _ in range(n)]
EVERYTHING = range(3)
FOREVER = 10**9


class RandomMask(Wrapper):
    """Another mask for each row, so that aggregations differ; of row 2 nothing is kept, nor of a grid of row 3."""

    def token_weights(self, rollout, steps):
        weights = self.agent.token_weights(rollout, steps)
        mask = torch.rand(weights.policy.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        mask[2], mask[3, 1:5] = False, False
        return weights._replace(policy=weights.policy * mask)


# The loss ------------------------------------------------------------------------------------------------------------


def share(name, kept, b, i):
    """The weight of token i of row b, from what is kept of all rows, as lists of 0 and 1."""
    if not kept[b][i]:
        return 0.0
    if name == "constant":
        return 1 / 21 / 8
    if name == "token_mean":
        return 1 / sum(map(sum, kept))
    if name == "sequence_mean":
        return 1 / sum(kept[b]) / 8
    assert name == "step_mean"
    return 1 / sum(kept[b][j] for j in range(21) if GRID_OF[j] == GRID_OF[i]) / 3 / 8


def naive_loss(agent, rollout, old, kept, c):
    """One row and one token at a time, from the options ``c``; a scalar with a graph."""
    everything, total = [[1] * 21] * 8, torch.zeros(())
    for b in range(8):
        cond = agent.policy.take(rollout.cond, torch.tensor([b]))
        grids = [grid[b : b + 1] for grid in rollout.grids]
        logp = agent.policy(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]  # (L, V)
        with torch.no_grad():
            ref = agent.reference(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0]
        tokens = torch.cat(grids, 1).flatten().tolist()
        a = rollout.advantages[b].item()
        for i in range(21):
            among = {
                "token": [i],
                "grid": [j for j in range(21) if GRID_OF[j] == GRID_OF[i]],
                "sequence": list(range(21)),
            }[c["ratio_level"]]
            ratio = (sum(logp[j, tokens[j]] - old[b, j] for j in among) / len(among)).exp()
            low, high = 1 - c["clip_range"], 1 + (c["clip_range_high"] or c["clip_range"])
            clipped = low if ratio < low else high if ratio > high else ratio
            term = min(ratio * a, clipped * a)
            if c["dual_clip"] and a < 0:
                term = max(term, torch.tensor(c["dual_clip"] * a))
            total = total - share(c["aggregation"], kept, b, i) * term
            r = ref[i, tokens[i]] - logp[i, tokens[i]]
            kl = {
                "k1": -r,
                "k2": r * r / 2,
                "k3": r.exp() - r - 1,
                "full": (logp[i].exp() * (logp[i] - ref[i])).sum(),
            }[c["kl"]]
            entropy = -(logp[i].exp() * logp[i]).sum()
            whole = share(c["aggregation"], everything, b, i)
            total = total + whole * ((c["kl_coef"] if c["kl_in"] == "loss" else 0) * kl - c["entropy_coef"] * entropy)
    return total


PLAIN = {
    "clip_range": 0.2,
    "clip_range_high": None,
    "dual_clip": None,
    "ratio_level": "token",
    "aggregation": "constant",
    "kl": "k3",
    "kl_in": "loss",
    "kl_coef": 0.3,
    "entropy_coef": 0.0,
}
VARIANTS = [
    {"clip_range_high": 0.6, "aggregation": "token_mean", "kl": "k2"},
    {"dual_clip": 1.5, "aggregation": "sequence_mean", "entropy_coef": 0.1},
    {"ratio_level": "grid", "aggregation": "step_mean", "kl": "k1", "entropy_coef": 0.2},
    {"ratio_level": "sequence", "clip_range": 0.01, "clip_range_high": 0.02, "kl": "full"},
    {"dual_clip": 1.1, "clip_range_high": 0.3, "kl_in": "reward", "kl": "k1", "aggregation": "token_mean"},
]


def on_policy_no_more(parts, **options):
    """An agent off its reference, a judged rollout, and log-probabilities of another policy that sampled it."""
    agent = tiny_agent(parts, **{"minibatches": 2, **options})
    rollout = agent.sample()
    nudge(agent, 0.1)
    noise = torch.randn(8, 22, generator=torch.Generator().manual_seed(0)) / 3
    old = agent.old_log_probs(rollout, EVERYTHING) + noise[:, :21] + noise[:, 21:]  # by token, and by row
    agent.old_log_probs = lambda rollout, steps: old
    return agent, agent.judge(rollout, EVERYTHING), old


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_gradient_match_a_naive_loop(parts, options):
    agent, rollout, old = on_policy_no_more(parts, **PLAIN | options)
    masked = RandomMask(agent)
    weights = masked.token_weights(rollout, EVERYTHING)
    shares = agent.aggregate(weights, EVERYTHING)
    loss, seen = agent.loss(rollout, torch.arange(8), rollout.advantages, shares, old, EVERYTHING)
    assert seen.ratio.min() < 0.99 and seen.ratio.max() > 1.01
    slow = naive_loss(agent, rollout, old, (weights.policy > 0).int().tolist(), PLAIN | options)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-4)
    parameters = list(agent.policy.parameters())
    for fast, by_hand in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(slow, parameters), strict=True):
        torch.testing.assert_close(fast, by_hand, atol=1e-5, rtol=1e-3)


def rotated():
    """Every ratio level with every aggregation, the other options in turn, so that each meets several others."""
    pairs = [(level, name) for level in losses.RATIO_LEVELS for name in ("constant", *list(losses.AGGREGATIONS)[1:4])]
    for i, (level, aggregation) in enumerate(pairs):
        yield {
            "ratio_level": level,
            "aggregation": aggregation,
            "kl": ("k1", "k2", "k3", "full")[(i + i // 4) % 4],
            "kl_in": ("loss", "reward", "loss")[i % 3],
            "advantage_scale": ("batch", "none", "group")[(i // 2) % 3],
            "entropy_coef": (0.0, 0.1)[(i // 3) % 2],
            "clip_range_high": (None, 0.5)[i % 2],
            "dual_clip": (None, 1.2)[(i // 2) % 2],
        }


@pytest.mark.parametrize("options", list(rotated()), ids=lambda options: " ".join(map(str, options.values())))
def test_micro_batches_leave_the_update_unchanged(parts, options):
    agent, rollout, _ = on_policy_no_more(parts, kl_coef=0.3, **options)
    masked = RandomMask(agent)
    found, advantages = [], []
    for cut in (None, 1, 3):
        # `gradients` takes a step of size 0, after which what the policies said counts as old.
        rollout = replace(rollout, old_logp=None, ref_logp=None, features=None, version=None)
        agent.micro_batch = cut
        agent.generator.manual_seed(0)  # of the minibatches
        advantages.append(agent.judge(rollout, EVERYTHING).advantages)
        found.append(gradients(agent, rollout, masked.token_advantages(rollout, EVERYTHING)))
    for other in (1, 2):
        torch.testing.assert_close(advantages[0], advantages[other], atol=1e-4, rtol=1e-3)
        assert_same(found[0], found[other], atol=1e-6, rtol=1e-3)
    assert found[0]["head.weight"].abs().max() > 1e-5


def test_masked_aggregations_differ(parts):
    """Otherwise the test above proves little."""
    found = []
    for aggregation in ("constant", "token_mean", "sequence_mean", "step_mean"):
        agent, rollout, _ = on_policy_no_more(parts, aggregation=aggregation, kl_coef=0.0)
        RandomMask(agent)
        found.append(gradients(agent, rollout, rollout.advantages)["head.weight"])
    for i in range(4):
        for j in range(i):
            assert (found[i] - found[j]).norm() > 0.02 * found[i].norm()


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.3, 1.6, 4.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_clip_higher_and_dual_clip(ratio, advantage):
    given = torch.tensor([[ratio]], requires_grad=True)
    loss = losses.clipped_loss(given, torch.tensor([advantage]), 0.2, 0.4, 3.0)
    (slope,) = torch.autograd.grad(loss.sum(), given)
    if advantage > 0:
        expected = (-advantage * min(ratio, 1.4), -advantage if ratio < 1.4 else 0.0)
    elif advantage < 0:
        inside = 0.8 < ratio < 3.0
        expected = (-advantage * min(max(ratio, 0.8), 3.0), -advantage if inside else 0.0)
    else:
        expected = (0.0, 0.0)
    assert (loss.item(), slope.item()) == pytest.approx(expected)


class TestEntropy:
    @pytest.mark.parametrize("alpha", [None, 1.0])
    def test_is_taken_off_the_loss(self, parts, alpha):
        """The mean of the tokens' entropies, or with PANW's exponent at 1 the mean of the grids' means."""
        found = []
        for coef in (0.0, 0.5):
            agent = tiny_agent(parts, kl_coef=0.0, entropy_coef=coef)
            outermost = agent if alpha is None else PANW(agent, alpha=alpha)
            rollout = agent.judge(agent.sample(), EVERYTHING)
            shares = agent.aggregate(outermost.token_weights(rollout, EVERYTHING), EVERYTHING)
            found.append(agent.loss(rollout, torch.arange(8), rollout.advantages, shares, None, EVERYTHING))
        entropy = found[0][1].entropy  # (B, n)
        if alpha is None:
            expected = sum(map(sum, entropy.tolist())) / 21 / 8
        else:
            expected = sum(part.mean().item() for part in entropy.split(SIZES, 1)) / 3
        assert (found[1][0] - found[0][0]).item() == pytest.approx(-0.5 * expected, rel=1e-4)

    def test_reaches_rows_without_advantage(self, parts):
        agent = tiny_agent(parts, kl_coef=0.0, entropy_coef=0.5)
        rollout = agent.sample()
        loss = -0.5 * agent.log_probs(agent.policy, rollout, torch.arange(8), EVERYTHING).entropy.mean()
        names, weights = zip(*agent.policy.named_parameters(), strict=True)
        expected = torch.autograd.grad(loss, weights, materialize_grads=True)
        found = gradients(agent, rollout, torch.zeros(8))
        assert_same(found, dict(zip(names, expected, strict=True)), atol=1e-6, rtol=1e-3)

    def test_raises_the_entropy(self, parts):
        agent = tiny_agent(parts, kl_coef=0.0, entropy_coef=0.5, learning_rate=1e-3)
        agent.policy.sharpness.requires_grad_(False)
        nudge(agent, 0.3)
        rollout = agent.sample()
        rows = torch.arange(8)
        before = agent.log_probs(agent.policy, rollout, rows, EVERYTHING).entropy.mean().item()
        for _ in range(3):
            agent.update(rollout, torch.zeros(8), EVERYTHING)
        assert agent.log_probs(agent.policy, rollout, rows, EVERYTHING).entropy.mean().item() > before + 0.01


class TestKLInTheReward:
    def kl_of_row(self, agent, rollout, b, kind):
        cond = agent.policy.take(rollout.cond, torch.tensor([b]))
        grids = [grid[b : b + 1] for grid in rollout.grids]
        with torch.no_grad():
            new, ref = (p(cond, grids, EVERYTHING).log_softmax(-1)[0, :, 0] for p in (agent.policy, agent.reference))
        total = 0.0
        for i, token in enumerate(torch.cat(grids, 1).flatten().tolist()):
            r = (ref[i, token] - new[i, token]).item()
            full = sum(math.exp(p) * (p - q) for p, q in zip(new[i].tolist(), ref[i].tolist(), strict=True))
            total += {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - r - 1, "full": full}[kind]
        return total

    @pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
    @pytest.mark.parametrize("micro_batch", [None, 3])
    def test_scores_and_advantages(self, parts, kind, micro_batch):
        agent = tiny_agent(parts, kl_in="reward", kl=kind, kl_coef=0.3, micro_batch=micro_batch)
        nudge(agent, 0.1)
        rollout = agent.sample()
        judged = agent.judge(rollout, EVERYTHING)
        for p in range(2):
            worth = [
                rollout.scores[p, g].item() - 0.3 * self.kl_of_row(agent, rollout, 4 * p + g, kind) for g in range(4)
            ]
            assert judged.scores[p].tolist() == pytest.approx(worth, rel=1e-4, abs=1e-4)
            mean = sum(worth) / 4
            std = math.sqrt(sum((w - mean) ** 2 for w in worth) / 3)
            expected = [(w - mean) / (std + 1e-4) for w in worth]
            assert judged.advantages[4 * p : 4 * p + 4].tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3)

    def test_and_not_in_the_loss(self, parts):
        found = []
        for options in ({"kl_in": "reward", "kl_coef": 0.3}, {"kl_coef": 0.0}):
            agent = tiny_agent(parts, **options)
            nudge(agent)
            found.append(gradients(agent, agent.sample(), torch.tensor([1.0, -1.0] * 4)))
        assert_same(*found, atol=1e-7, rtol=1e-5)

    def test_holds_the_policy_back(self, parts):
        """With all rewards equal, the KL in the reward still points back to the reference."""
        agent = tiny_agent(parts | {"reward": Picky(lambda i: False)}, kl_in="reward", kl="k1", group_size=16)
        nudge(agent, 0.1)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        assert len(set(rollout.scores.flatten().tolist())) > 1
        gap = agent.kl_to_reference(rollout, torch.arange(32), EVERYTHING).sum(1).view(2, 16)
        for p in range(2):
            assert rollout.advantages.view(2, 16)[p].argmax() == gap[p].argmin()


# Advantages ----------------------------------------------------------------------------------------------------------


class TestAdvantageScales:
    REWARDS = torch.tensor([[0.1, 0.4, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5], [0.3, 0.31, 0.3, 0.3]])

    def naive(self, scale, eps):
        rows = self.REWARDS.tolist()
        centred = [[r - sum(row) / 4 for r in row] for row in rows]
        flat = [c for row in centred for c in row]
        batch = math.sqrt(sum(c * c for c in flat) / 11)
        found = []
        for row in centred:
            group = math.sqrt(sum(c * c for c in row) / 3)
            found.append([c / {"group": group + eps, "batch": batch + eps, "none": 1.0}[scale] for c in row])
        return torch.tensor(found)

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    def test_match_a_naive_loop(self, parts, scale):
        agent = tiny_agent(parts, advantage_scale=scale, advantage_eps=1e-2, kl_coef=0.0)
        rollout = agent.sample()
        rollout.scores = self.REWARDS
        found = agent.advantages(rollout, EVERYTHING).view(3, 4)
        torch.testing.assert_close(found, self.naive(scale, 1e-2), atol=1e-6, rtol=1e-4)
        assert (found[1] == 0).all()

    def test_leave_one_out(self):
        found = losses.leave_one_out(self.REWARDS)
        for row, expected in zip(found.tolist(), self.REWARDS.tolist(), strict=True):
            for g in range(4):
                others = [r for h, r in enumerate(expected) if h != g]
                assert row[g] == pytest.approx(expected[g] - sum(others) / 3, abs=1e-6)
        assert (found[1] == 0).all()
        with pytest.raises(ValueError, match="at least 2"):
            losses.leave_one_out(torch.ones(3, 1))

    def test_a_nearly_constant_group_stays_small_in_the_batch(self):
        group, batch = (losses.group_advantages(self.REWARDS, scale=scale) for scale in ("group", "batch"))
        assert group[2].abs().max() > 1 and batch[2].abs().max() < 0.1


# Dynamic sampling ----------------------------------------------------------------------------------------------------


class Picky(Reward):
    """The brightness of an image, but the same for all of a prompt unless ``useful(i)``, i counting new prompts.

    Says its own score in the words, the regions and the parts, so that they can be checked against the images.
    """

    name = "picky"

    def __init__(self, useful):
        self.useful, self.seen = useful, {}

    def score(self, images, scenes):
        numbers = [self.seen.setdefault(scene.prompt, len(self.seen)) for scene in scenes]
        true = brightness(images)
        scores = np.array([s if self.useful(i) else 0.5 for i, s in zip(numbers, true, strict=True)], np.float32)
        words = [[f"{s:.7f}"] for s in true]
        boxes = [np.array([[0, 0, 64 * s, 8]], np.float32) for s in true]
        return RewardOutput(scores, {"true": true}, words, [[1.0]] * len(images), boxes)


def brightness(images):
    return images.mean((1, 2, 3)).astype(np.float32) / 255


def assert_aligned(agent, rollout):
    """Whatever a rollout says of its rows and images is of the same rows and images."""
    p, g = rollout.scores.shape
    k = rollout.suffixes
    assert len(rollout.scenes) == p * g and len(rollout.images) == p * g * k == len(rollout.regions)
    true = brightness(rollout.images)
    np.testing.assert_allclose(rollout.returns.flatten(), true, rtol=1e-6)
    np.testing.assert_allclose(rollout.parts["true"], true, rtol=1e-6)
    assert rollout.words_read == [[f"{s:.7f}"] for s in true]
    np.testing.assert_allclose([box[0, 2] for box in rollout.regions], 64 * true, rtol=1e-6)
    for row, scene in enumerate(rollout.scenes):
        assert scene is rollout.scenes[row - row % g]
        prompt = bytes(rollout.cond.bytes[row, 1:].tolist()).rstrip(b"\0").decode()
        assert prompt == scene.prompt
    steps = range(len(rollout.grids))
    with torch.no_grad():
        logp, _ = agent.policy.evaluate(rollout.cond, rollout.grids, steps)
    torch.testing.assert_close(logp, torch.cat([draw.logp for draw in rollout.draws], 1), atol=1e-4, rtol=1e-4)


def dynamic_agent(parts, useful, dynamic_sampling, cls=GRPO, **options):
    return tiny_agent(parts | {"reward": Picky(useful)}, cls, dynamic_sampling=dynamic_sampling, **options)


class TestDynamicSampling:
    def test_drop_leaves_out_groups_that_teach_nothing(self, parts):
        full = dynamic_agent(parts, lambda i: i == 1, "keep").sample()
        agent = dynamic_agent(parts, lambda i: i == 1, "drop")
        kept = agent.sample()
        assert kept.scores.shape == (1, 4) and torch.equal(kept.scores, full.scores[1:])
        assert np.array_equal(kept.images, full.images[4:])
        assert all(torch.equal(a, b[4:]) for a, b in zip(kept.grids, full.grids, strict=True))
        assert_aligned(agent, kept)
        assert agent.images_decoded == 8

    def test_drop_learns_what_keep_learns_but_for_the_mean(self, parts):
        """Half of the rows are left, each counts twice."""
        found = []
        for how in ("keep", "drop"):
            agent = dynamic_agent(parts, lambda i: i == 1, how, kl_coef=0.0)
            rollout = agent.judge(agent.sample(), EVERYTHING)
            found.append(gradients(agent, rollout, rollout.advantages))
        assert_same({name: 2 * g for name, g in found[0].items()}, found[1], atol=1e-6, rtol=1e-3)

    @pytest.mark.parametrize(
        ("useful", "max_batches", "batches", "prompts"),
        [
            ({0, 1}, 4, 1, [0, 1]),
            ({1, 2, 3}, 4, 2, [1, 2]),  # one too many
            ({0, 5}, 4, 3, [0, 5]),
            ({0, 5}, 2, 2, [0]),  # not full in time
        ],
    )
    def test_resample_fills_the_batch(self, parts, tmp_path, useful, max_batches, batches, prompts):
        agent = dynamic_agent(parts, useful.__contains__, "resample", max_batches=max_batches)
        agent.set_logger(csv_logger(tmp_path))
        rollout = agent.sample()
        assert_aligned(agent, rollout)
        numbers = agent.env.reward.seen
        assert [numbers[scene.prompt] for scene in rollout.scenes[::4]] == prompts
        assert agent.images_decoded == 8 * batches and agent.tokens_sampled == 8 * 21 * batches
        values = agent.logger.name_to_value
        assert values["rollout/batches"] == batches
        assert values["rollout/groups_kept"] == len(useful & set(range(2 * batches)))

    def test_resample_draws_other_prompts_in_every_update(self, parts):
        agent = dynamic_agent(parts, lambda i: i % 4 == 3, "resample", max_batches=4)
        first, second = agent.sample(), agent.sample()
        assert not {scene.prompt for scene in first.scenes} & {scene.prompt for scene in second.scenes}

    @pytest.mark.parametrize("how", ["drop", "resample"])
    def test_nothing_useful_changes_nothing(self, parts, how):
        agent = dynamic_agent(parts, lambda i: False, how, kl_coef=0.0, max_batches=3)
        before = weights_of(agent.policy)
        agent.learn(1)
        assert agent.n_updates == 1 and same(weights_of(agent.policy), before)
        assert agent.images_decoded == 8 * (1 if how == "drop" else 3)

    def test_nothing_useful_but_the_kl(self, parts):
        agent = dynamic_agent(parts, lambda i: False, "drop", kl_coef=0.3)
        nudge(agent, 0.1)
        before = weights_of(agent.policy)
        agent.learn(1)
        assert not same(weights_of(agent.policy), before)

    def test_a_budget_ends_the_resampling(self, parts):
        agent = dynamic_agent(parts, lambda i: i in (0, 9), "resample", max_batches=9, kl_coef=0.0)
        before = weights_of(agent.policy)
        agent.learn(FOREVER, StopAfter(images=16))
        assert agent.images_decoded == 16 and agent.n_updates == 1
        assert not same(weights_of(agent.policy), before)  # from the one group there was

    def test_a_callback_that_stops_in_the_middle_of_a_batch(self, parts):
        class StopAt(AgentCallback):
            def _on_step(self):
                return self.num_timesteps != STEPS_A_ROLLOUT + 8

        agent = dynamic_agent(parts, lambda i: i in (0, 9), "resample", max_batches=9, kl_coef=0.0)
        before = weights_of(agent.policy)
        agent.learn(FOREVER, StopAt())
        assert agent.images_decoded == 8 and agent.n_updates == 1 and agent.num_timesteps == STEPS_A_ROLLOUT + 8
        assert not same(weights_of(agent.policy), before)

    @pytest.mark.parametrize("first_update", [0, 3], ids=["prefix", "suffix"])
    @pytest.mark.parametrize("how", ["drop", "resample"])
    def test_vmr(self, parts, how, first_update):
        agent = dynamic_agent(parts, lambda i: i in (1, 2), how, VMR, split=2, suffix_samples=3, kl_coef=0.0)
        MaskPropagation(PANW(agent))
        agent._n_updates = first_update
        prefix = agent.stage == "prefix"
        rollout = agent.sample()
        assert_aligned(agent, rollout)
        assert rollout.scores.shape == (1 if how == "drop" else 2, 4)
        assert rollout.suffixes == (3 if prefix else 1) and len(rollout.grids) == (2 if prefix else 3)
        if prefix:
            torch.testing.assert_close(rollout.scores, middle_return(rollout.returns, 1.0))
        before = weights_of(agent.policy)
        agent.learn_from(rollout, range(2) if prefix else range(2, 3))
        assert not same(weights_of(agent.policy), before)

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, tmp_path):
        def agent():
            return tiny_agent(parts, dynamic_sampling="resample", max_batches=2, epochs=2)

        whole = agent().learn(FOREVER, StopAfter(updates=3))
        agent().learn(FOREVER, StopAfter(updates=2)).save(tmp_path / "agent")
        resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
        resumed.learn(FOREVER, StopAfter(updates=3), reset_num_timesteps=False)
        assert same(weights_of(resumed.policy), weights_of(whole.policy))
        assert resumed.images_decoded == whole.images_decoded


class TestGroups:
    def assert_equal(self, left, right):
        for a, b in zip(left.draws, right.draws, strict=True):
            assert all(torch.equal(*parts) for parts in zip(a[:3], b[:3], strict=True))
        for name in ("scores", "returns"):
            assert torch.equal(getattr(left, name), getattr(right, name))
        for a, b in zip(left.cond, right.cond, strict=True):
            assert torch.equal(a, b)
        assert left.scenes == right.scenes and left.words_read == right.words_read
        assert np.array_equal(left.images, right.images)
        assert all(np.array_equal(a, b) for a, b in zip(left.regions, right.regions, strict=True))
        assert left.parts.keys() == right.parts.keys()
        assert all(np.array_equal(left.parts[name], right.parts[name]) for name in left.parts)

    @pytest.mark.parametrize("cls", [GRPO, VMR])
    def test_apart_and_together_again(self, parts, cls):
        agent = dynamic_agent(parts, lambda i: True, "keep", cls)
        rollout = agent.sample()
        split = [rollout.groups(agent.policy, torch.tensor(keep)) for keep in ([True, False], [False, True])]
        assert [len(part.scores) for part in split] == [1, 1]
        self.assert_equal(Rollout.concatenate(agent.policy, split), rollout)
        self.assert_equal(rollout.groups(agent.policy, torch.tensor([True, True])), rollout)

    def test_none_of_one_and_all_of_another(self, parts):
        agent = dynamic_agent(parts, lambda i: True, "keep")
        first, second = agent.sample(), agent.sample()
        none = first.groups(agent.policy, torch.tensor([False, False]))
        assert none.scores.shape == (0, 4) and not none.scenes and len(none.images) == 0
        self.assert_equal(Rollout.concatenate(agent.policy, [none, second]), second)
        assert len(Rollout.concatenate(agent.policy, [none, none]).scores) == 0

    def test_seconds_add_up(self, parts):
        agent = tiny_agent(parts)
        rollouts = [agent.sample(), agent.sample()]
        both = Rollout.concatenate(agent.policy, rollouts)
        for phase, seconds in both.seconds.items():
            assert seconds == pytest.approx(sum(rollout.seconds[phase] for rollout in rollouts))


# The update's loop ---------------------------------------------------------------------------------------------------


class TestTargetKL:
    def steps_taken(self, parts, tmp_path, **options):
        agent = tiny_agent(parts, **{"epochs": 3, "minibatches": 2, "learning_rate": 1e-2, **options})
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(STEPS_A_ROLLOUT)
        with open(tmp_path / "progress.csv") as file:
            (row,) = csv.DictReader(file)
        assert agent.n_updates == 1
        return float(row["train/optimizer_steps"]), agent

    @pytest.mark.parametrize(("target", "expected"), [(1e-6, 1), (1e6, 6), (None, 6)])
    def test_ends_the_update(self, parts, tmp_path, target, expected):
        assert self.steps_taken(parts, tmp_path, target_kl=target)[0] == expected

    def test_the_step_that_is_too_far_is_not_taken(self, parts, tmp_path):
        _, stopped = self.steps_taken(parts, tmp_path, target_kl=1e-6, minibatches=1)
        once = tiny_agent(parts, learning_rate=1e-2).learn(STEPS_A_ROLLOUT)
        assert_same(weights_of(stopped.policy), weights_of(once.policy), atol=1e-4, rtol=1e-3)
        assert all(weight.grad is None for weight in stopped.policy.parameters())

    def test_the_bound_is_one_and_a_half_times_the_target(self, parts, tmp_path, monkeypatch):
        values = [0.0149, 0.0151]  # before the second step, before the third
        monkeypatch.setattr(logs, "approx_kl", lambda *_: values.pop(0) if values else 0.0)
        assert self.steps_taken(parts, tmp_path, target_kl=0.01)[0] == 2

    def test_the_estimate(self, parts):
        agent, rollout, old = on_policy_no_more(parts)
        shares = agent.aggregate(agent.token_weights(rollout, EVERYTHING), EVERYTHING)
        _, seen = agent.loss(rollout, torch.arange(8), rollout.advantages, shares, old, EVERYTHING)
        new = agent.log_probs(agent.policy, rollout, torch.arange(8), EVERYTHING).logp
        gaps = (new - old).flatten().tolist()
        expected = sum(math.exp(gap) - 1 - gap for gap in gaps) / len(gaps)
        assert logs.approx_kl([seen]) == pytest.approx(expected, rel=1e-3)


class TestRefreshReference:
    OPTIONS = {"kl_coef": 0.1, "learning_rate": 1e-2, "refresh_reference": 2}

    def test_becomes_the_policy_every_n_updates(self, parts):
        agent, equal = tiny_agent(parts, **self.OPTIONS), []
        update = agent.update

        def watched(*args):
            update(*args)
            equal.append(same(weights_of(agent.reference), weights_of(agent.policy)))

        agent.update = watched
        agent.learn(4 * STEPS_A_ROLLOUT)
        assert equal == [False, True, False, True]
        assert agent.reference is not agent.policy
        assert not any(weight.requires_grad for weight in agent.reference.parameters())

    def test_the_kl_starts_again_at_zero(self, parts, tmp_path):
        agent = tiny_agent(parts, **self.OPTIONS)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(4 * STEPS_A_ROLLOUT)
        with open(tmp_path / "progress.csv") as file:
            kl = [float(row["train/kl"]) for row in csv.DictReader(file)]
        assert kl[0] == kl[2] == 0 and kl[1] > 0 and kl[3] > 0

    def test_0_is_never(self, parts):
        agent = tiny_agent(parts, **self.OPTIONS | {"refresh_reference": 0})
        before = weights_of(agent.policy)
        agent.learn(2 * STEPS_A_ROLLOUT)
        assert same(weights_of(agent.reference), before)

    def test_resume_is_bit_for_bit_the_uninterrupted_run(self, parts, tmp_path):
        whole = tiny_agent(parts, **self.OPTIONS).learn(5 * STEPS_A_ROLLOUT)
        tiny_agent(parts, **self.OPTIONS).learn(3 * STEPS_A_ROLLOUT).save(tmp_path / "agent")
        resumed = GRPO.load(tmp_path / "agent", env=tiny_envs(parts), device="cpu")
        resumed.learn(2 * STEPS_A_ROLLOUT, reset_num_timesteps=False)
        for name in ("policy", "reference"):
            assert same(weights_of(getattr(resumed, name)), weights_of(getattr(whole, name)))


# The registries ------------------------------------------------------------------------------------------------------


class TestRegisteredFunctions:
    def test_an_aggregation_of_ones_own(self, parts, monkeypatch):
        monkeypatch.setattr(losses.AGGREGATIONS, "_entries", dict(losses.AGGREGATIONS))

        @losses.AGGREGATIONS.register("finest_only")
        def finest_only(weights, sizes):
            keep = torch.zeros_like(weights)
            keep[:, -sizes[-1] :] = 1 / sizes[-1] / len(weights)
            return keep

        agent = tiny_agent(parts, aggregation="finest_only", kl_coef=0.0)
        rollout = agent.judge(agent.sample(), EVERYTHING)
        shares = agent.aggregate(agent.token_weights(rollout, EVERYTHING), EVERYTHING)
        loss, seen = agent.loss(rollout, torch.arange(8), rollout.advantages, shares, None, EVERYTHING)
        assert loss.item() == pytest.approx(seen.policy_loss[:, 5:].mean().item(), abs=1e-6)
        # The position of a coarse token moves the fine ones through attention alone, the finest directly.
        moved = gradients(agent, rollout, rollout.advantages)["sharpness"]
        assert moved[:2].tolist() == [0, 0] and moved[2] != 0

    def test_a_ratio_level_an_estimate_and_a_scale_of_ones_own(self, parts, monkeypatch):
        for registry in (losses.RATIO_LEVELS, losses.KL_ESTIMATES, losses.ADVANTAGE_SCALES):
            monkeypatch.setattr(registry, "_entries", dict(registry))
        losses.RATIO_LEVELS.register("none")(lambda log_ratio, sizes: log_ratio - log_ratio.detach())
        losses.KL_ESTIMATES.register("absolute")(lambda r: r.abs())
        losses.ADVANTAGE_SCALES.register("sign")(lambda centred, rewards, eps, ddof: centred.sign())
        agent = tiny_agent(parts, ratio_level="none", kl="absolute", advantage_scale="sign", epochs=2)
        agent.learn(STEPS_A_ROLLOUT)
        assert set(agent.judge(agent.sample(), EVERYTHING).advantages.tolist()) == {-1.0, 1.0}

    def test_is_gone_with_its_registration(self, parts):
        with pytest.raises(ValueError, match="'finest_only': choose one of constant, token_mean"):
            tiny_agent(parts, aggregation="finest_only")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_in": "advantage"}, "kl_in 'advantage': choose one of loss, reward"),
        ({"aggregation": "mean"}, "aggregation 'mean': choose one of constant, token_mean"),
        ({"advantage_scale": "rank"}, "advantage_scale 'rank': choose one of group, batch, none"),
        ({"dynamic_sampling": True}, "dynamic_sampling True: choose one of keep, drop, resample"),
        ({"max_batches": 0}, "max_batches .* at least 1, got 0"),
        ({"refresh_reference": -1}, "refresh_reference .* at least 0, got -1"),
        ({"refresh_reference": 1.5}, "refresh_reference .* 1.5"),
        ({"clip_range_high": -0.1}, "clip_range_high must be above 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, got 1.0"),
        ({"target_kl": 0.0}, "target_kl must be above 0, got 0.0"),
        ({"entropy_coef": -0.1}, "entropy_coef .* -0.1"),
        ({"entropy_coef": math.nan}, "entropy_coef .* nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"temperature_lr": -1e-5}, "temperature_lr must be a finite number of at least 0, got -1e-05"),
        ({"temperature_lr": math.inf}, "temperature_lr .* got inf"),
        ({"temperature_lr": "slow"}, "temperature_lr .* got 'slow'"),
        ({"kl_per_update": 0.0}, "kl_per_update must be above 0, got 0.0"),
        ({"soft_codes": 0.0}, "soft_codes must be above 0, got 0.0"),
        ({"epochs": 0}, "epochs .* got 0"),
    ],
    ids=str,
)
def test_bad_values(parts, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_agent(parts, **options)
