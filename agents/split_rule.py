"""Where VMR splits, found while it learns: the rule behind ``VMR(split="auto")``.

**What is measured.** How much of the returns' variance among a prompt's images is decided when the first m grids are
drawn: the share ``d_m = b / (b + w)``, with b the variance between prefixes and w that among suffixes of one prefix.
It is the intraclass correlation of the returns, and a prefix update with K suffixes of each prefix shows it for its m.
No image is drawn for the rule alone. It visits the candidates in real updates: each once in the beginning, and then,
with every 8th prefix update, that with the oldest measurement.

**What a split is worth.** Near the reference and for eta above the rewards' spread, the objective can gain
``v / (2 eta)``, v the variance, of which ``d_m`` lies in the prefix and the rest in the suffix (the second cumulant of
eqs. 3 and 4). An update's step has about the same length whatever the gradient's (AdamW; the group's deviation in the
advantages does the same), and with few images most of it is noise. So it gains the squared length of the true
gradient over the length of its noise. If every token's score counts the same, the former goes with the variance that
the learned grids decide, and the squared latter with the variance of the advantages times the number n of tokens that
share it. In units of ``sqrt(v)``:

    prefix update:  d_m / sqrt((d_m + (1 - d_m) / K) n_prefix)      suffix update:  sqrt((1 - d_m) / n_suffix)

The rule takes the m with the largest sum of these over one cycle of prefix and suffix updates, in which every m costs
the same number of images. A prefix that decides nothing is worth nothing; one that decides all but has many tokens
that do not matter is worth less than a shorter one. PANW and MP weigh tokens, and this account does not look at it.

**Caution.** One batch of 8 x 8 prefixes and K = 2 tells a share to about 0.1, and the best of several noisy numbers is
mostly a lucky one: a short prefix, which has few tokens to divide by, would win by noise alone. So each share is taken
two standard errors below its measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

CANDIDATES = 8  # splits that are visited, at most; a raster schedule has hundreds
MEMORY = 8  # batches: a variance is the mean of its first ones, and then a moving average
REVISIT = 8  # prefix updates between two visits for the sake of measuring
CAUTION = 2.0  # standard errors


def variance_components(returns: Tensor) -> tuple[float, float]:
    """The variance of ``(P prompts, prefixes, K suffixes)`` returns between the prefixes of a prompt, and within them.

    The means over K suffixes vary by the prefix and by ``within / K``, which is taken off (one-way analysis of variance
    with random effects); what is left may come out below 0 where the prefix decides nothing.
    """
    within = returns.var(2).mean().item()
    return returns.mean(2).var(1).mean().item() - within / returns.shape[2], within


def share_error(share: float, suffix_samples: int, prefixes: float) -> float:
    """The standard error of an intraclass correlation (Fisher's, for normal returns).

    Args:
        share: the correlation.
        suffix_samples: K, at least 2.
        prefixes: how many were compared, less one for each mean that they were compared with.
    """
    k = suffix_samples
    return (1 - share) * (1 + (k - 1) * share) * math.sqrt(2 / (k * (k - 1) * prefixes))


def rising(values: Sequence[float], counts: Sequence[float]) -> list[float]:
    """The non-decreasing numbers that are nearest to ``values``, in squares weighted by ``counts``.

    Neighbours in the wrong order are pooled (Ayer et al., 1955).
    """
    blocks: list[tuple[float, float, int]] = []  # mean, count, values
    for value, count in zip(values, counts, strict=True):
        blocks.append((value, count, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m, i), (b, n, j) = blocks[-2:]
            blocks[-2:] = [((m * a + n * b) / (m + n), m + n, i + j)]
    return [mean for mean, _, length in blocks for _ in range(length)]


def worth_of_split(
    share: float,
    prefix_tokens: int,
    suffix_tokens: int,
    suffix_samples: int,
    prefix_updates: int,
    suffix_updates: int,
) -> float:
    """What a cycle of updates gains at a split, up to a factor that is the same for all; see the module's text.

    Args:
        share: of the variance that the prefix decides, 0 to 1.
        prefix_tokens, suffix_tokens: on either side of the split.
        suffix_samples: K.
        prefix_updates, suffix_updates: of a cycle.
    """
    prefix_gain = share / math.sqrt((share + (1 - share) / suffix_samples) * prefix_tokens)
    return prefix_updates * prefix_gain + suffix_updates * math.sqrt((1 - share) / suffix_tokens)


@dataclass
class SplitRule:
    """What has been measured at the candidates, and which split comes next. Deterministic; all state is in its fields.

    Args:
        sizes: tokens of each grid, at least two grids.
    """

    sizes: tuple[int, ...]
    candidates: list[int] = field(init=False)
    between: list[float] = field(init=False)  # b of each candidate
    within: list[float] = field(init=False)  # w
    errors: list[float] = field(init=False)  # of the share, squared, that one batch leaves
    batches: list[int] = field(init=False)  # that measured it
    measured_at: list[int] = field(init=False)  # the last of them, counted over all

    def __post_init__(self) -> None:
        last = len(self.sizes) - 1
        if last < 1:
            raise ValueError("split='auto' needs a schedule of at least two grids, got one")
        steps = max(min(CANDIDATES, last) - 1, 1)
        self.candidates = sorted({1 + (i * (last - 1) + steps // 2) // steps for i in range(steps + 1)})
        count = len(self.candidates)
        self.between, self.within, self.errors = [0.0] * count, [0.0] * count, [0.0] * count
        self.batches, self.measured_at = [0] * count, [0] * count

    def observe(self, m: int, returns: Tensor) -> None:
        """Take in the returns of a prefix update at split m, ``(P, G, K)`` with G and K of at least 2."""
        prompts, group_size, k = returns.shape
        i = self.candidates.index(m)
        self.batches[i] += 1
        self.measured_at[i] = sum(self.batches)
        weight = 1 / min(self.batches[i], MEMORY)
        between, within = variance_components(returns.double())
        self.between[i] += weight * (between - self.between[i])
        self.within[i] += weight * (within - self.within[i])
        error = share_error(self._share(i), k, prompts * (group_size - 1)) ** 2
        self.errors[i] += weight * (error - self.errors[i])

    def _share(self, i: int) -> float:
        total = self.between[i] + self.within[i]
        return min(max(self.between[i] / total, 0.0), 1.0) if total > 0 else 0.0

    def shares(self) -> dict[int, float]:
        """d_m of the candidates that have been measured, m to share.

        It cannot fall with m. Where the measurements do, that is noise, and neighbours are averaged.
        """
        known = [i for i, count in enumerate(self.batches) if count]
        fitted = rising([self._share(i) for i in known], [min(self.batches[i], MEMORY) for i in known])
        return {self.candidates[i]: share for i, share in zip(known, fitted, strict=True)}

    def worths(self, suffix_samples: int, prefix_updates: int, suffix_updates: int) -> dict[int, float]:
        """`worth_of_split` of the candidates that have been measured, with caution, m to worth."""
        found = {}
        for m, share in self.shares().items():
            i = self.candidates.index(m)
            cautious = max(share - CAUTION * math.sqrt(self.errors[i] / min(self.batches[i], MEMORY)), 0.0)
            tokens = sum(self.sizes[:m]), sum(self.sizes[m:])
            found[m] = worth_of_split(cautious, *tokens, suffix_samples, prefix_updates, suffix_updates)
        return found

    def choose(self, measures: bool, suffix_samples: int, prefix_updates: int, suffix_updates: int) -> int:
        """The split of the next update, which ``measures`` if it is one of prefixes; the earliest of equals."""
        if measures and 0 in self.batches:
            return self.candidates[self.batches.index(0)]
        if measures and sum(self.batches) % REVISIT == 0:
            return self.candidates[self.measured_at.index(min(self.measured_at))]
        worths = self.worths(suffix_samples, prefix_updates, suffix_updates)
        return max(worths, key=worths.__getitem__, default=self.candidates[0])
