"""The region-count filter for a corpus of prompts, the paper's appendix C.

A text-rendering region is one quoted text of the prompt, ``"GO NOW"`` as well as ``"RUN"``. Corpora hold far too many
prompts with a single one, and a long tail with more than five. The filter keeps the largest part of a corpus that has
a target profile, by default that of the paper's evaluation set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor
from typing import Any

import numpy as np

from var_env.scenes import TARGET_REGIONS, quoted_texts, region_profile

MANY = ">5"  # the histogram's last bin
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996 in floats and should be 29


def count_regions(prompt: str) -> int:
    """The number of quoted texts in a prompt; 0 when there is none."""
    return len(quoted_texts(prompt))


def region_histogram(prompts: Sequence[str]) -> dict[int | str, int]:
    """How many prompts have 1, 2, 3, 4, 5 and ``">5"`` regions, the paper's bins. Those with none are in no bin."""
    return histogram(map(count_regions, prompts))


def histogram(regions: Iterable[int]) -> dict[int | str, int]:
    """The same from the numbers of regions."""
    counts = Counter(regions)
    return {count: counts[count] for count in range(1, 6)} | {
        MANY: sum(number for count, number in counts.items() if count > 5)
    }


def filter_regions(
    prompts: Sequence[str], profile: Mapping[Any, float] | str = TARGET_REGIONS, seed: int = 0
) -> list[str]:
    """The largest part of a corpus whose region counts follow the profile.

    Of N prompts, each count has its share of N, rounded up or down. Which of its prompts are kept is drawn from the
    seed; they come in the corpus's order. A prompt that occurs twice counts twice.

    Args:
        profile: a mapping from a number of regions to its share, or ``"target"``.

    Raises:
        ValueError: shares that do not sum to one, or a count of the profile that no prompt of the corpus has.
    """
    return [prompts[i] for i in rows_of_profile([count_regions(prompt) for prompt in prompts], profile, seed)]


def rows_of_profile(
    regions: Sequence[int], profile: Mapping[Any, float] | str = TARGET_REGIONS, seed: int = 0
) -> np.ndarray:
    """Which rows `filter_regions` keeps, in ascending order, from the number of regions of each."""
    shares = {count: share for count, share in region_profile(profile).items() if share > 0}
    counts = np.asarray(regions)
    members = {count: np.flatnonzero(counts == count) for count in shares}
    empty = sorted(count for count in shares if not len(members[count]))
    if empty:
        raise ValueError(
            f"no prompt of the corpus has {empty[0]} regions, which the profile {shares} wants: leave it out of the "
            f"profile, or add prompts; the corpus has {histogram(regions)}"
        )
    quotas = largest_quotas(shares, {count: len(members[count]) for count in shares})
    rng = np.random.default_rng(seed)
    kept = np.concatenate([rng.choice(members[count], quotas[count], replace=False) for count in sorted(shares)])
    return np.sort(kept)


def largest_quotas(shares: Mapping[int, float], available: Mapping[int, int]) -> dict[int, int]:
    """How many to take of each count, for the largest sum N that leaves each at ``share * N``, rounded up or down.

    Args:
        shares: positive, with sum one.
        available: how many there are of each count, at least 1, so that N = 1 is always possible.
    """
    total = min(sum(available.values()), *(ceil((available[count] + 1) / share) for count, share in shares.items()))
    while (quotas := round_shares(shares, available, total)) is None:
        total -= 1
    return quotas


def round_shares(shares: Mapping[int, float], available: Mapping[int, int], total: int) -> dict[int, int] | None:
    """Each ``share * total``, rounded up or down so that the sum is ``total`` and no more is taken than available.

    Those that rounding down hurts most go up. ``None`` when it cannot be done.
    """
    wanted = {count: share * total for count, share in shares.items()}
    quotas = {count: floor(number + ROUNDING) for count, number in wanted.items()}
    can_rise = [count for count in shares if quotas[count] < min(available[count], ceil(wanted[count] - ROUNDING))]
    missing = total - sum(quotas.values())
    if any(quotas[count] > available[count] for count in shares) or missing > len(can_rise):
        return None
    can_rise.sort(key=lambda count: quotas[count] - wanted[count])
    return {count: quota + (count in can_rise[:missing]) for count, quota in quotas.items()}
