"""How much of each family of planted faults an agent has repaired, from what was measured beside the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.statistics import Array, Interval, interval, scalar
from var_env.attributes import chances

Records = Sequence[Mapping[str, Any]]  # a record of `var_env.attributes` a run, of the same N prompts; lists as in JSON


def repaired(base: Records, agent: Records, **options: Any) -> dict[str, Interval]:
    """The share of each family's faults that an agent has repaired: 1 - (rate of faults now) / (the base policy's).

    So 1 is a policy without faults and 0 the base, whatever rate was planted; below 0 the fault has become more
    frequent. Everything but the right thing is a fault, the partner and an illegible letter alike, so that one that
    blurs a letter has repaired nothing. Rates are of all letters, pairs or inks together: prompts with many affected
    letters weigh more.

    Args:
        base, agent: a record a run, as `attributes` gives it, of the same prompts.
        options: of `agents.statistics.interval`.

    Returns:
        By family the share and the ends of its bootstrap interval over seeds and prompts. NaN where a family cannot
        show: no prompt is affected, no affected letter was shown, or the base policy makes no such fault. The ends
        alone are NaN where so few can show that some resample has none.

    Raises:
        ValueError: no records, or records of prompts that differ.
    """
    before, now = stacked("base", base), stacked("agent", agent)
    return {family: _repaired(before[family], now[family], options) for family in before}


def right(records: Records, **options: Any) -> dict[str, Interval]:
    """Of each family the share of chances at which the right thing stood, with its interval; see `repaired`."""
    return {family: _right(counts, options) for family, counts in stacked("agent", records).items()}


def stacked(who: str, records: Records) -> dict[str, Array]:
    """The chances of each family and those that are right, of S runs on N prompts: (2, S, N)."""
    if not records:
        raise ValueError(f"{who}: no records; give one a run")
    counts = [chances({name: np.asarray(values, np.float32) for name, values in record.items()}) for record in records]
    sizes = {len(run["letter"][0]) for run in counts}
    if len(sizes) > 1:
        raise ValueError(f"{who}: the runs must be measured on the same prompts, got {sorted(sizes)} of them")
    return {family: np.stack([run[family] for run in counts], 1).astype(np.float64) for family in counts[0]}


def _rate(counts: Array) -> Array:
    """Of arrays (2, ..., S, N) the share of chances that are not right (...); NaN without chances."""
    chance, good = counts.sum((-2, -1))
    with np.errstate(invalid="ignore"):
        return np.asarray(1 - good / chance)


def _repaired(before: Array, now: Array, options: Mapping[str, Any]) -> Interval:
    def share(base: Array, agent: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = 1 - _rate(agent) / _rate(base)
        return np.where(np.isfinite(shares), shares, np.nan)

    if not before[0].any() or not now[0].any() or _rate(before) == 0:
        return float("nan"), float("nan"), float("nan")
    return scalar(interval(share, before, now, **options))


def _right(counts: Array, options: Mapping[str, Any]) -> Interval:
    if not counts[0].any():
        return float("nan"), float("nan"), float("nan")
    return scalar(interval(lambda x: 1 - _rate(x), counts, **options))
