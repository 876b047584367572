"""Statistics of agents: against naive references, and against simulated agents of which the truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from agents.statistics import (
    Components,
    difference,
    estimate,
    interval,
    iqm,
    mean,
    performance_profile,
    probability_of_improvement,
    prompt_wins,
    resampled_prompts,
    run_wins,
    scalar,
)

LEVELS = {"seeds": 0.05, "prompts": 0.2, "noise": 0.3}  # standard deviations of simulated scores


def agents(rng, shift=0.0, seeds=5, prompts=40, others=None):
    """Scores of two agents on the same prompts; the first is better by `shift`."""
    level = LEVELS | (others or {})
    hard = rng.normal(0, level["prompts"], prompts)
    apart = rng.normal(0, level["prompts"], prompts)
    runs = [rng.normal(0, level["seeds"], (seeds, 1)) + rng.normal(0, level["noise"], (seeds, prompts)) for _ in "ab"]
    return shift + hard + apart + runs[0], hard + runs[1]


class TestMeasures:
    def test_iqm_is_the_mean_of_the_middle_half(self):
        scores = np.random.default_rng(0).normal(size=(3, 4, 10))
        naive = [np.mean(sorted(x.flatten())[10:30]) for x in scores]
        np.testing.assert_allclose(iqm(scores), naive)  # another order of summation
        odd = scores[..., :9]
        np.testing.assert_allclose(iqm(odd), stats.trim_mean(odd.reshape(3, -1), 0.25, axis=1))

    def test_wins_are_counted_pair_by_pair(self):
        rng = np.random.default_rng(1)
        x, y = rng.integers(3, size=(3, 7)).astype(float), rng.integers(3, size=(2, 7)).astype(float)
        better = lambda p, q: 1.0 if p > q else 0.5 if p == q else 0.0  # noqa: E731
        cells = [better(x[i, k], y[j, k]) for i in range(3) for j in range(2) for k in range(7)]
        assert prompt_wins(x, y) == pytest.approx(np.mean(cells))
        assert run_wins(x, y) == pytest.approx(np.mean([better(p.mean(), q.mean()) for p in x for q in y]))
        for wins in (prompt_wins, run_wins):
            assert wins(x, y) + wins(y, x) == pytest.approx(1)

    def test_profile(self):
        scores = np.array([[0.0, 0.5, 1.0], [0.5, 0.5, 1.0]])
        profile = performance_profile(scores, [-1, 0, 0.5, 1])
        assert profile[0] == pytest.approx([1, 5 / 6, 2 / 6, 0])
        assert (profile[1] <= profile[0]).all() and (profile[0] <= profile[2]).all()
        assert profile.min() >= 0 and profile.max() <= 1


class TestInterval:
    def test_the_same_arguments_the_same_interval(self):
        x, _ = agents(np.random.default_rng(0))
        assert estimate(x) == estimate(x) != estimate(x, seed=1)
        wide, narrow = estimate(x), estimate(x, level=0.5)
        assert wide[1] < narrow[1] < narrow[0] < narrow[2] < wide[2]

    def test_scores_that_do_not_vary(self):
        assert estimate(np.full((3, 5), 2.0)) == (2.0, 2.0, 2.0)
        assert difference(np.ones((2, 5)), np.zeros((1, 5))) == (1.0, 1.0, 1.0)
        assert probability_of_improvement(np.ones((2, 5)), np.zeros((2, 5))) == (1.0, 1.0, 1.0)

    def test_paired_over_prompts(self):
        rng = np.random.default_rng(0)
        hard = rng.normal(0, 1, 50)
        first, second = (hard + rng.normal(0, 0.01, (3, 50)) for _ in "ab")
        _, low, high = difference(first + 0.1, second)
        assert 0 < low < 0.1 < high < 0.2
        _, low, high = estimate(first)
        assert high - low > 0.3  # and here the prompts do not cancel

    def test_strata_keep_their_size(self):
        strata = ["two", "one", "two", "one", "one"]
        drawn = resampled_prompts(5, strata, 100, np.random.default_rng(0))
        assert drawn.shape == (100, 5) and (np.isin(drawn, [0, 2]).sum(1) == 2).all()
        scores = np.array([[1.0, 0, 1, 0, 0]] * 2)
        assert estimate(scores, strata=strata) == (0.4, 0.4, 0.4) != estimate(scores)

    def test_leading_axes_go_through(self):
        x, y = agents(np.random.default_rng(0), shift=1.0)
        both = interval(lambda pair: mean(pair[0]) - mean(pair[1]), np.stack([x, y]))
        assert scalar(both)[0] == pytest.approx(x.mean() - y.mean())

    @pytest.mark.parametrize("measure", [mean, iqm])
    @pytest.mark.parametrize("others", [{}, {"seeds": 0.0, "prompts": 0.02}], ids=["all", "noise"])
    def test_covers_the_truth_as_often_as_it_says(self, measure, others):
        """Of 150 intervals of 95 % between 89.5 and 100 % hold the truth: 3 standard errors of a count."""
        rng, truth = np.random.default_rng(0), 0.3  # of symmetric scores the mean and the IQM are the same
        found = [difference(*agents(rng, truth, others=others), measure, n=100, seed=i) for i in range(150)]
        assert np.mean([low <= truth <= high for _, low, high in found]) >= 0.895
        # And no wider than they must be: within a fifth of Student's with 8 degrees of freedom, which is the widest.
        level = LEVELS | others
        error = math.sqrt(2 * level["seeds"] ** 2 / 5 + level["prompts"] ** 2 / 40 + 2 * level["noise"] ** 2 / 200)
        assert np.mean([high - low for _, low, high in found]) < 1.2 * 2 * 2.31 * error

    def test_one_seed_speaks_of_its_prompts(self):
        x, _ = agents(np.random.default_rng(0), seeds=1, prompts=100)
        value, low, high = estimate(x)
        assert high - low == pytest.approx(2 * 1.98 * x.std(ddof=1) / 10, rel=0.15)  # of 1,000 resamples
        assert value == pytest.approx(x.mean())


class TestPower:
    def test_components_of_simulated_scores(self):
        first, second = agents(np.random.default_rng(0), seeds=100, prompts=400)
        found = Components.of(first, second)
        assert found.noise == pytest.approx(2 * 0.3**2, rel=0.05)
        assert found.seeds == pytest.approx(2 * 0.05**2, rel=0.4)  # 198 degrees of freedom: 10 %, 4 of them
        assert found.prompts == pytest.approx(0.2**2, rel=0.3)
        assert found.trained == 2

    def test_against_the_base_there_is_one_agent_with_seeds(self):
        first, second = agents(np.random.default_rng(0), seeds=100, prompts=400)
        found = Components.of(first, second[:1])
        assert found.trained == 1 and found.noise == pytest.approx(0.3**2, rel=0.05)
        assert found.prompts == pytest.approx(0.2**2 + 0.3**2, rel=0.3)  # the base's noise stays, whatever the seeds

    def test_the_difference_is_found_with_the_power_that_it_says(self):
        """By Student's test with measured variances. Their clipping at zero costs a little: within 0.06 of 0.8."""
        rng, found = np.random.default_rng(0), 0
        truth = Components(2 * 0.05**2, 0.2**2, 2 * 0.3**2, 2)
        shift = truth.detectable(seeds=4, prompts=50)
        for _ in range(1000):
            first, second = agents(rng, shift, 4, 50)
            error, degrees = Components.of(first, second).standard_error(4, 50)
            found += abs(first.mean() - second.mean()) > error * student(degrees)
        assert found / 1000 == pytest.approx(0.8, abs=0.06)

    def test_the_interval_finds_it_as_often(self):
        """100 comparisons, 4 standard errors of a count: within 0.16 of 0.8."""
        rng = np.random.default_rng(1)
        shift = Components(2 * 0.05**2, 0.2**2, 2 * 0.3**2, 2).detectable(seeds=4, prompts=50)
        lows = [difference(*agents(rng, shift, 4, 50), n=100, seed=i)[1] for i in range(100)]
        assert np.mean(np.array(lows) > 0) == pytest.approx(0.8, abs=0.16)

    def test_more_of_anything_finds_less(self):
        found = Components(0.001, 0.02, 0.2, 2)
        assert found.detectable(3, 100) > found.detectable(5, 100) > found.detectable(5, 500)
        assert found.detectable(5, 100, power=0.9) > found.detectable(5, 100)
        assert found.detectable(5, 100, level=0.99) > found.detectable(5, 100)
        assert Components(0, 0, 0, 2).detectable(5, 100) == 0

    def test_seeds_needed_is_the_first_that_finds_it(self):
        found = Components(0.002, 0.02, 0.2, 2)
        seeds = found.seeds_needed(0.05, prompts=500)
        assert found.detectable(seeds, 500) <= 0.05 < found.detectable(seeds - 1, 500)
        assert found.seeds_needed(0.05, prompts=20) == math.inf  # no seed makes up for prompts
        assert found.seeds_needed(10, prompts=500) == 2


def student(degrees, level=0.95):

    return stats.t.ppf((1 + level) / 2, degrees)


class TestBadInput:
    @pytest.mark.parametrize("scores", [[1.0, 2.0], [[1.0], [2.0]], np.zeros((0, 3))])
    def test_shapes(self, scores):
        with pytest.raises(ValueError, match=r"shape \(seeds, prompts\) with at least 2 prompts"):
            estimate(scores)

    def test_not_finite(self):
        with pytest.raises(ValueError, match="seed 1 on prompt 2 is not finite"):
            estimate([[1, 2, 3], [1, 2, math.nan]])

    def test_other_prompts(self):
        with pytest.raises(ValueError, match="same prompts, got 3 and 4"):
            difference(np.zeros((2, 3)), np.zeros((2, 4)))

    def test_strata(self):
        with pytest.raises(ValueError, match="2 strata for 3 prompts"):
            estimate(np.zeros((2, 3)), strata=[1, 2])

    def test_level(self):
        with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
            estimate(np.zeros((2, 3)), level=95)

    def test_power_of_one_seed(self):
        with pytest.raises(ValueError, match="one seed says nothing of the variance"):
            Components.of(np.zeros((1, 3)), np.zeros((1, 3)))
        with pytest.raises(ValueError, match="at least 2 seeds and 2 prompts, got 1 and 3"):
            Components(1, 1, 1, 2).detectable(1, 3)

    def test_power_out_of_range(self):
        found = Components(1, 1, 1, 2)
        with pytest.raises(ValueError, match=r"0 < 1 - level < power < 1, got 0\.95 and 80"):
            found.detectable(3, 3, power=80)
        with pytest.raises(ValueError, match="difference must be positive, got 0"):
            found.seeds_needed(0, 3)
