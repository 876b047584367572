import csv
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny import csv_logger, tiny_agent, tiny_envs, weights_of
from token_world import TokenTokenizer, new_policy, tokens_shown

from agents import VMR, StopAfter, load
from agents.split_rule import MEMORY, REVISIT, SplitRule, rising, share_error, variance_components, worth_of_split
from rewards.base import Reward, RewardOutput
from var_env import ScaleSchedule, VARTextVectorEnv

SIZES = (1, 4, 9, 16, 36, 64)  # the shipped schedule


class ThreeGrids(TokenTokenizer):
    """`TokenTokenizer` for three grids, which fill all channels of the image."""

    def __init__(self, schedule=ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16), vocab_size=4):  # noqa: B008
        super().__init__(schedule, vocab_size)
        self.codebook = torch.nn.functional.pad(self.codebook, (0, 1))  # a feature has as many numbers as a cell

    def decode(self, canvas):
        cells = (255 * canvas).round().to(torch.uint8)
        return cells.repeat_interleave(16, 2).repeat_interleave(16, 3).permute(0, 2, 3, 1).contiguous()


class OneGridCounts(Reward):
    """The fraction of zeros in grid ``t``, which thus decides all."""

    name = "one_grid_counts"

    def __init__(self, tokenizer, t):
        self.tokenizer, self.t = tokenizer, t

    def score(self, images, scenes):
        return RewardOutput((tokens_shown(images, self.tokenizer)[self.t] == 0).mean(1).astype(np.float32))


def world(t):
    tokenizer = ThreeGrids().eval().requires_grad_(False)
    return {"tokenizer": tokenizer, "reward": OneGridCounts(tokenizer, t)}


def auto(parts, **options):
    """P = 4 prompts, G = 4."""
    settings = {"split": "auto", "group_size": 4, "prompts_per_update": 4, "learning_rate": 0.0, "seed": 0}
    agent = VMR(
        new_policy(parts["tokenizer"]),
        VARTextVectorEnv(4, **parts),
        image_interval=0,
        device="cpu",
        **settings | options,
    )
    return agent


def visited(agent, updates):
    found = []
    for _ in range(updates):
        found.append(agent.m)
        agent.iterate()
    return found


def returns_of(between, within, shape=(400, 4, 2), seed=0):
    """Returns of prefixes and suffixes that decide such variances, beside a prompt's own level."""
    rng = np.random.default_rng(seed)
    p, g, _ = shape
    parts = rng.normal(0, 3, (p, 1, 1)), between**0.5 * rng.normal(size=(p, g, 1)), within**0.5 * rng.normal(size=shape)
    return torch.as_tensor(sum(parts))


class TestRising:
    def test_what_rises_stays(self):
        assert rising([-1, 2, 2, 3], [1, 5, 1, 1]) == [-1, 2, 2, 3]

    def test_neighbours_are_pooled_by_their_counts(self):
        assert rising([4, 1, 3], [1, 3, 2]) == pytest.approx([1.75, 1.75, 3])
        assert rising([1, 4, 2, 0], [1, 1, 1, 3]) == pytest.approx([1, 1.2, 1.2, 1.2])

    def test_is_the_max_min_formula(self):
        """Each is the greatest, over beginnings, of the least mean up to an end (Robertson et al., 1988)."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            values, counts = rng.normal(size=6).tolist(), rng.integers(1, 4, 6).tolist()

            def mean(a, b, values=values, counts=counts):
                return np.average(values[a : b + 1], weights=counts[a : b + 1])

            expected = [max(min(mean(a, b) for b in range(i, 6)) for a in range(i + 1)) for i in range(6)]
            assert rising(values, counts) == pytest.approx(expected)


class TestWorth:
    worth = staticmethod(partial(worth_of_split, suffix_samples=2, prefix_updates=3, suffix_updates=1))

    def test_is_the_formula(self):
        variance, decided = 0.5, 0.3  # whose unit cancels
        expected = 3 * decided / math.sqrt((decided + 0.2 / 2) * 5) + 0.2 / math.sqrt(0.2 * 16)
        assert self.worth(decided / variance, 5, 16) == pytest.approx(expected / math.sqrt(variance))

    def test_a_prefix_that_decides_nothing_is_worth_nothing(self):
        assert worth_of_split(0.0, 5, 16, 2, 3, 0) == 0
        assert self.worth(1.0, 5, 16) == pytest.approx(3 / math.sqrt(5))

    @pytest.mark.parametrize("decisive", range(6))
    def test_where_one_grid_decides_all_the_prefix_ends_with_it(self, decisive):
        """Or the suffix is that grid alone, when it is the last one."""
        worths = [self.worth(float(m > decisive), sum(SIZES[:m]), sum(SIZES[m:])) for m in range(1, len(SIZES))]
        assert int(np.argmax(worths)) + 1 == min(decisive + 1, 5)

    def test_of_the_shipped_world(self):
        """The shares of results/plain/README.md, "What a prefix decides"."""
        shares = (0.040, 0.049, 0.225, 0.522, 0.653)
        worths = {m: self.worth(share, sum(SIZES[:m]), sum(SIZES[m:])) for m, share in enumerate(shares, 1)}
        assert sorted(worths, key=worths.__getitem__)[::-1] == [4, 5, 3, 1, 2]


@pytest.mark.parametrize("shape", [(8, 8, 2), (4, 6, 4)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_the_error_of_a_share_is_what_batches_show(share, shape):
    found = []
    for seed in range(400):
        between, within = variance_components(returns_of(share, 1 - share, shape, seed))
        found.append(between / (between + within))
    p, g, k = shape
    assert np.mean(found) == pytest.approx(share, abs=0.03)
    assert np.std(found) == pytest.approx(share_error(share, k, p * (g - 1)), rel=0.2)


class TestRule:
    cycle = (2, 3, 1)

    def test_candidates(self):
        assert SplitRule(SIZES).candidates == [1, 2, 3, 4, 5]
        assert SplitRule((1, 4)).candidates == [1]
        assert SplitRule((1,) * 64).candidates == [1, 10, 19, 28, 36, 45, 54, 63]
        for length in range(2, 100):
            found = SplitRule((1,) * length).candidates
            assert found[0] == 1 and found[-1] == length - 1 and len(found) == min(8, length - 1)

    def test_one_grid_has_no_split(self):
        with pytest.raises(ValueError, match="at least two grids"):
            SplitRule((1,))

    def test_shares_are_measured(self):
        rule, expected = SplitRule(SIZES), (0.0, 0.1, 0.4, 0.9, 1.0)
        for m, decided in enumerate(expected, 1):
            for seed in range(4):
                rule.observe(m, returns_of(decided, 1 - decided, seed=10 * m + seed))
        assert list(rule.shares().values()) == pytest.approx(expected, abs=0.05)

    def test_the_first_batches_are_averaged_and_old_ones_forgotten(self):
        rule, values = SplitRule(SIZES), []
        for i in range(MEMORY + 3):
            batch = torch.tensor([[[0.0, float(i)], [0.0, float(i)]]])
            values.append(variance_components(batch)[1])  # i^2 / 2
            rule.observe(1, batch)
            if i == MEMORY - 1:
                assert rule.within[0] == pytest.approx(np.mean(values))
        expected = np.mean(values[:MEMORY])
        for value in values[MEMORY:]:
            expected += (value - expected) / MEMORY
        assert rule.within[0] == pytest.approx(expected)

    def test_a_share_counts_two_errors_below_its_measurement(self):
        rule = SplitRule(SIZES)
        for seed in range(3):
            rule.observe(3, returns_of(0.5, 0.5, (8, 8, 2), seed))
        share = rule.shares()[3]
        errors = math.sqrt(np.mean(rule.errors[2]) / 3)
        assert errors == pytest.approx(share_error(share, 2, 56) / math.sqrt(3), rel=0.1)
        expected = worth_of_split(share - 2 * errors, 14, 116, *self.cycle)
        assert rule.worths(*self.cycle) == {3: pytest.approx(expected)}

    def test_visits_all_then_the_best_and_now_and_then_the_oldest(self):
        rule, found, update = SplitRule(SIZES), [], 0
        while len(found) < 40:
            measures = update % 4 < 3
            m = rule.choose(measures, *self.cycle)
            assert m == rule.choose(measures, *self.cycle)  # asking changes nothing
            if measures:
                found.append(m)
                rule.observe(m, returns_of(1.0 * (m >= 3), 1.0 * (m < 3), seed=update))
            elif len(found) >= 5:
                assert m == 3  # a suffix update looks for nothing
            update += 1
        oldest = [found[n] for n in range(REVISIT, 40, REVISIT)]
        assert found[:5] == [1, 2, 3, 4, 5] and oldest == [1, 2, 4, 5]
        assert {m for n, m in enumerate(found[5:], 5) if n % REVISIT} == {3}

    def test_a_suffix_update_before_any_measurement(self):
        assert SplitRule(SIZES).choose(False, *self.cycle) == 1

    def test_without_any_variance_the_latest(self):
        rule = SplitRule(SIZES)
        for m in rule.candidates:
            rule.observe(m, torch.ones(2, 4, 2))
        assert set(rule.shares().values()) == {0.0} and rule.choose(True, *self.cycle) == 5

    def test_noise_alone_makes_no_short_prefix_the_best(self):
        """Where the prefix decides nothing, the luckiest of the short ones would win without caution."""
        chosen = []
        for trial in range(50):
            rule = SplitRule(SIZES)
            for m in rule.candidates:
                rule.observe(m, returns_of(0.0, 1.0, (8, 8, 2), 10 * trial + m))
            chosen.append(rule.choose(False, *self.cycle))
        assert chosen.count(5) >= 45

    def test_follows_a_change(self):
        rule = SplitRule(SIZES)
        for _, m in itertools.product(range(MEMORY), rule.candidates):
            rule.observe(m, returns_of(1.0 * (m >= 2), 1.0 * (m < 2)))
        assert rule.choose(False, *self.cycle) == 2
        for _, m in itertools.product(range(4 * MEMORY), rule.candidates):
            rule.observe(m, returns_of(1.0 * (m >= 5), 1.0 * (m < 5)))
        assert rule.choose(False, *self.cycle) == 5


class TestVMR:
    @pytest.mark.parametrize(("decisive", "m"), [(0, 1), (1, 2), (2, 2)])
    def test_finds_the_split(self, decisive, m):
        """Where one grid decides all: the prefix ends with it, or else the suffix is that grid."""
        agent = auto(world(decisive))
        found = visited(agent, 16)
        assert found[:2] == [1, 2] and found[10] == 3 - m  # the other one once more, with the ninth prefix update
        assert set(found[2:10] + found[11:]) == {m}

    def test_finds_it_while_it_learns(self):
        agent = auto(world(1), learning_rate=1e-2)
        assert visited(agent, 16)[11:] == [2] * 5

    def test_learns_at_the_split_that_it_samples(self):
        agent, asked = auto(world(0)), []
        learn = agent.learn_from
        agent.learn_from = lambda rollout, steps: (asked.append((len(rollout.grids), steps)), learn(rollout, steps))
        splits = visited(agent, 6)
        for update, (m, (grids, steps)) in enumerate(zip(splits, asked, strict=True)):
            prefix = update % 4 < 3
            assert steps == (range(m) if prefix else range(m, 3)) and grids == (m if prefix else 3)

    def test_logs(self, tmp_path):
        agent = auto(world(0))
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(10**6, StopAfter(updates=3))
        with open(tmp_path / "progress.csv") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["vmr/split"]) for row in rows] == [1, 2, 1]
        assert rows[0]["vmr/decided_m2"] == "" and float(rows[2]["vmr/decided_m1"]) == 1
        assert float(rows[2]["vmr/worth_m1"]) > float(rows[2]["vmr/worth_m2"]) > 0

    def test_a_run_spends_its_images(self):
        agent = auto(world(2))  # ends at the later split, whose images take fewer steps
        agent.learn(agent.timesteps(400), StopAfter(images=400))
        assert 400 <= agent.images_decoded < 400 + 32

    @pytest.mark.parametrize("updates", [1, 5])
    def test_resumed_run_is_the_uninterrupted_one(self, parts, tmp_path, updates):
        settings = {"split": "auto", "learning_rate": 1e-3}
        whole = tiny_agent(parts, VMR, **settings)
        whole.learn(10**6, StopAfter(updates=12))
        first = tiny_agent(parts, VMR, **settings)
        first.learn(10**6, StopAfter(updates=updates))
        first.save(tmp_path / "agent.zip")
        resumed = VMR.load(tmp_path / "agent.zip", tiny_envs(parts), device="cpu")
        assert resumed.split == "auto" and resumed.m == first.m and resumed.split_rule == first.split_rule
        resumed.learn(10**6, StopAfter(updates=12), reset_num_timesteps=False)
        assert resumed.split_rule == whole.split_rule and resumed.num_timesteps == whole.num_timesteps
        mine, other = weights_of(resumed.policy), weights_of(whole.policy)
        assert all(torch.equal(mine[name], other[name]) for name in other)

    def test_the_split_can_be_replaced_when_a_file_is_read(self, parts, tmp_path):
        agent = tiny_agent(parts, VMR, split="auto")
        visited(agent, 3)
        agent.save(tmp_path / "auto.zip")
        fixed = load(tmp_path / "auto.zip", device="cpu", split=2)
        assert (fixed.split, fixed.m) == (2, 2)
        tiny_agent(parts, VMR, split=2).save(tmp_path / "fixed.zip")
        again = load(tmp_path / "fixed.zip", device="cpu", split="auto")
        assert again.split == "auto" and again.m == 1

    def test_a_fixed_split_has_no_rule(self, parts, tmp_path):
        agent = tiny_agent(parts, VMR, split=2)
        agent.set_logger(csv_logger(tmp_path))
        agent.learn(1)
        assert agent.split_rule is None and agent.m == agent.split == 2
        assert "vmr/split" not in (tmp_path / "progress.csv").read_text()

    @pytest.mark.parametrize("options", [{"suffix_samples": 1}, {"alternation": "coarse"}, {"split": "best"}], ids=str)
    def test_bad_options(self, parts, options):
        message = "split must be the number.*'best'" if "split" in options else "split='auto'.*of at least 2"
        with pytest.raises(ValueError, match=message):
            tiny_agent(parts, VMR, **{"split": "auto"} | options)
