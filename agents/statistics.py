"""Statistics of compared agents: estimates with intervals over seeds and prompts, and what they have power to see.

Scores are arrays (S, N): S seeds, each a training run from the start, by N held-out prompts, the same for all. Both are
samples, of the runs and of the prompts that might have been, and every interval speaks of both; with one seed it speaks
of that run alone. The measures are those that Agarwal et al. (*Deep Reinforcement Learning at the Edge of the
Statistical Precipice*, arXiv 2108.13264) recommend, with prompts in the place of their tasks.

Their `rliable` resamples the runs of each task on its own. Here one run is scored on all prompts, so that a run that
failed is low on every one of them; and the prompts themselves are a sample. So runs and prompts are resampled, crossed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Interval = tuple[float, float, float]  # the estimate, and the ends of its interval
Statistic = Callable[..., Array]  # of arrays (..., n, S, N), one an agent, to (..., n)
CHUNK = 2**22  # scores that are resampled at a time: 32 MiB


# Measures ------------------------------------------------------------------------------------------------------------


def mean(scores: Array) -> Array:
    """Over seeds and prompts, the last two axes."""
    return scores.mean((-2, -1))


def iqm(scores: Array) -> Array:
    """The interquartile mean over seeds and prompts, the last two axes: of the middle half of all scores.

    An outlier weighs nothing. Of a score with few values, such as the accuracy of one or two words, more than half are
    soon equal, and then the measure no longer moves: take `mean` for those.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), -1)  # 3 to 20 times as fast as `scipy.stats.trim_mean`
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def prompt_wins(first: Array, second: Array) -> Array:
    """Of all pairs of a run of each agent, on all prompts, the share in which the first scores higher.

    Agarwal et al.'s probability of improvement, with prompts as tasks; a tie counts one half. With one image a prompt
    it is mostly about the noise of single images, and stays near one half for agents that are clearly apart.
    """
    wins = [np.sign(first[..., [i], :] - second).mean((-2, -1)) for i in range(first.shape[-2])]
    return (1 + np.mean(wins, 0)) / 2


def run_wins(first: Array, second: Array) -> Array:
    """Of all pairs of a run of each agent, the share in which the first has the higher mean over the prompts."""
    wins = np.sign(first.mean(-1)[..., :, None] - second.mean(-1)[..., None, :])  # (..., S, S)
    return (1 + wins.mean((-2, -1))) / 2


# Intervals -----------------------------------------------------------------------------------------------------------


def estimate(scores: ArrayLike, measure: Statistic = mean, **options: Any) -> Interval:
    """A measure of one agent's scores (S, N) with its interval; options as for `interval`."""
    return scalar(interval(measure, scores, **options))


def difference(first: ArrayLike, second: ArrayLike, measure: Statistic = mean, **options: Any) -> Interval:
    """How much higher a measure of the first agent is, paired over the prompts; options as for `interval`."""
    return scalar(interval(lambda a, b: measure(a) - measure(b), first, second, **options))


def probability_of_improvement(
    first: ArrayLike, second: ArrayLike, wins: Statistic = run_wins, **options: Any
) -> Interval:
    """The probability that the first agent beats the second, by `run_wins` or `prompt_wins`.

    The interval lies in [0, 1]. [1, 1] says that no resample turned the order of two runs around, and not that none
    ever will.
    """
    value, low, high = scalar(interval(wins, first, second, **options))
    return value, max(low, 0.0), min(high, 1.0)


def performance_profile(scores: ArrayLike, thresholds: Sequence[float], **options: Any) -> Array:
    """The share of runs and prompts with a score above each of K thresholds, with its band, point by point: (3, K)."""

    def profile(x: Array) -> Array:
        return np.stack([(x > threshold).mean((-2, -1)) for threshold in thresholds])  # (K, n)

    return np.clip(interval(profile, scores, **options), 0, 1)


def interval(
    statistic: Statistic,
    *scores: ArrayLike,
    strata: Sequence[object] | None = None,
    level: float = 0.95,
    n: int = 1000,
    seed: int = 0,
) -> Array:
    """A statistic of one or several agents' scores and the ends of its bootstrap interval: (3, ...).

    Seeds are resampled for each agent apart, S - 1 of S, which makes the variance between few seeds unbiased (Rao and
    Wu, 1988); prompts are resampled for all agents together, so that they stay paired. Resampling both at once counts
    the noise within a cell three times, and each alone once (Owen, 2007, the pigeonhole bootstrap). So with the
    variances a (seeds alone), b (prompts alone) and c (both), that of the statistic is 2 (a + b) - c. The percentiles
    of the joint bootstrap are stretched about the estimate to that variance, and by the quotient of Student's quantile
    and the normal one, whose degrees of freedom are Satterthwaite's. The ends are NaN where a resample has no value.

    Args:
        statistic: of one array an agent, (..., n, S, N), to (..., n).
        scores: an array an agent, (..., S, N), of the same N prompts in the same order, and any S.
        strata: N labels, such as the number of words; prompts are resampled within each.
        level: of the interval, between 0 and 1.
        n: resamples.
        seed: of the resampling. The same arguments, the same interval.

    Raises:
        ValueError: scores of another form, that are not finite or of unequal prompts, fewer than 2 prompts, strata that
            are not N, or a level outside 0 to 1.
    """
    arrays = checked(scores)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    rng, prompts = np.random.default_rng(seed), arrays[0].shape[-1]
    all_seeds = [np.arange(x.shape[-2]) for x in arrays]
    some_prompts = resampled_prompts(prompts, strata, n, rng)  # (n, N)
    some_seeds = [rng.integers(len(s), size=(n, max(len(s) - 1, 1))) for s in all_seeds]  # (n, S - 1)

    value = statistic(*(x[..., None, :, :] for x in arrays))[..., 0]
    seeds_alone = _replicates(statistic, arrays, some_seeds, np.arange(prompts)[None].repeat(n, 0))
    prompts_alone = _replicates(statistic, arrays, [s[None].repeat(n, 0) for s in all_seeds], some_prompts)
    both = _replicates(statistic, arrays, some_seeds, some_prompts)  # (..., n)

    a, b, c = (replicates.var(-1) for replicates in (seeds_alone, prompts_alone, both))
    variance = np.where(np.maximum(a, b) > 0, np.maximum(2 * (a + b) - c, np.maximum(a, b)), c)
    free = sum(len(s) - 1 for s in all_seeds)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where nothing varies
        degrees = variance**2 / ((a**2 / free if free else 0) + b**2 / (prompts - 1))
        student = stats.t.ppf((1 + level) / 2, degrees) / stats.norm.ppf((1 + level) / 2)
        stretch = np.where(c == 0, 0, np.sqrt(variance / c) * student)
    ends = np.quantile(both, [(1 - level) / 2, (1 + level) / 2], axis=-1)  # (2, ...)
    return np.concatenate([value[None], value + stretch * (ends - value)])


def scalar(values: Array) -> Interval:
    """Three numbers (3,) as a tuple of floats."""
    value, low, high = (float(part) for part in values)
    return value, low, high


def checked(scores: Sequence[ArrayLike]) -> list[Array]:
    """The arrays as float64; `ValueError` unless they are as `interval` wants them."""
    arrays = [np.asarray(x, np.float64) for x in scores]
    for x in arrays:
        if x.ndim < 2 or x.shape[-2] < 1 or x.shape[-1] < 2:
            raise ValueError(f"scores must have shape (seeds, prompts) with at least 2 prompts, got {x.shape}")
        if not np.isfinite(x).all():
            bad = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0][-2:])
            raise ValueError(
                f"the score of seed {bad[0]} on prompt {bad[1]} is not finite; leave out prompts where the score "
                "is not applicable, for all agents"
            )
        if x.shape[-1] != arrays[0].shape[-1]:
            raise ValueError(
                f"agents must be scored on the same prompts, got {arrays[0].shape[-1]} and {x.shape[-1]} of them"
            )
    return arrays


def resampled_prompts(
    count: int, strata: Sequence[object] | None, n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Indices of prompts (n, count), drawn with replacement, within each stratum as many as it has."""
    if strata is None:
        return rng.integers(count, size=(n, count))
    if len(strata) != count:
        raise ValueError(f"got {len(strata)} strata for {count} prompts; give one label a prompt")
    labels = np.unique(np.asarray(strata), return_inverse=True)[1]
    members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    return np.concatenate([group[rng.integers(len(group), size=(n, len(group)))] for group in members], 1)


def _replicates(
    statistic: Statistic, arrays: Sequence[Array], seeds: Sequence[NDArray[np.int64]], prompts: NDArray[np.int64]
) -> Array:
    """The statistic of each resample (..., n), from indices of seeds (n, S) for each agent and of prompts (n, N)."""
    step = max(1, CHUNK // sum(x.size for x in arrays))
    return np.concatenate(
        [
            statistic(
                *(
                    x[..., s[start : start + step, :, None], prompts[start : start + step, None, :]]
                    for x, s in zip(arrays, seeds, strict=True)
                )
            )
            for start in range(0, len(prompts), step)
        ],
        -1,
    )


# Power ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """The variances that decide how well the difference of two agents' means is known.

    Attributes:
        seeds: between the runs of an agent, both agents' added.
        prompts: of the difference between the agents from prompt to prompt, what no further seed averages out.
        noise: of single scores of a run on a prompt, both agents' added.
        trained: how many of the two have several seeds; the base policy has one run, which is the same for all.
    """

    seeds: float
    prompts: float
    noise: float
    trained: int

    @classmethod
    def of(cls, first: ArrayLike, second: ArrayLike) -> Components:
        """From measured scores, (S, N) each, of the same prompts; the second may have one row, the base policy's.

        An analysis of variance of seeds crossed with prompts. Estimates below zero are zero.

        Raises:
            ValueError: as `interval`, or where no agent has 2 seeds.
        """
        arrays = checked([first, second])
        if any(x.ndim != 2 for x in arrays):
            raise ValueError(f"scores must have shape (seeds, prompts), got {[x.shape for x in arrays]}")
        several = [x for x in arrays if len(x) > 1]
        if not several:
            raise ValueError("one seed says nothing of the variance between seeds: give an agent 2 or more")
        n = arrays[0].shape[1]
        paired = (arrays[0].mean(0) - arrays[1].mean(0)).var(ddof=1)
        seeds = noise = 0.0
        for x in several:
            rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()
            cell = (rest**2).sum() / ((len(x) - 1) * (n - 1))
            noise += cell
            seeds += max(x.mean(1).var(ddof=1) - cell / n, 0.0)
            paired -= cell / len(x)
        return cls(float(seeds), max(float(paired), 0.0), float(noise), len(several))

    def standard_error(self, seeds: int, prompts: int) -> tuple[float, float]:
        """Of the difference of the means with so many seeds an agent and prompts, and its degrees of freedom."""
        if seeds < 2 or prompts < 2:
            raise ValueError(f"power needs at least 2 seeds and 2 prompts, got {seeds} and {prompts}")
        a, b = (self.seeds + self.noise / prompts) / seeds, self.prompts / prompts
        if a + b == 0:
            return 0.0, math.inf
        degrees = (a + b) ** 2 / (a**2 / (self.trained * (seeds - 1)) + b**2 / (prompts - 1))  # Satterthwaite
        return math.sqrt(a + b), degrees

    def detectable(self, seeds: int, prompts: int, power: float = 0.8, level: float = 0.95) -> float:
        """The smallest difference of the means whose interval leaves out zero with the probability `power`.

        Args:
            seeds: of each agent, at least 2.
            prompts: at least 2, the same for both agents.
            power: between 1 - level and 1.
            level: of the interval, between 0 and 1; two-sided.

        Raises:
            ValueError: one seed or prompt, or a power or level out of range.
        """
        if not 0 < 1 - level < power < 1:
            raise ValueError(f"level and power must fulfil 0 < 1 - level < power < 1, got {level} and {power}")
        error, degrees = self.standard_error(seeds, prompts)
        if error == 0:
            return 0.0
        edge = stats.t.ppf((1 + level) / 2, degrees)

        def missed(shift: float) -> float:  # of Student's t with the difference in standard errors as its shift
            inside = stats.nct.cdf([edge, -edge], degrees, shift)
            inside = np.nan_to_num(inside)  # SciPy gives NaN far out in the tail, where nothing is left inside
            return float(inside[0] - inside[1]) - (1 - power)

        most = 2.0 * edge
        while missed(most) > 0:
            most *= 2
        return error * optimize.brentq(missed, 0, most)

    def seeds_needed(
        self, difference: float, prompts: int, power: float = 0.8, level: float = 0.95, most: int = 1000
    ) -> float:
        """How many seeds an agent it takes to see a difference: 2 to `most`, and infinity where these are too few."""
        if not difference > 0:
            raise ValueError(f"difference must be positive, got {difference}")
        counts = range(2, most + 1)
        found = bisect_left(counts, True, key=lambda seeds: self.detectable(seeds, prompts, power, level) <= difference)
        return counts[found] if found < len(counts) else math.inf
