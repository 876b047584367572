"""Learning-rate schedules, in Stable-Baselines3's manner: called with the remaining progress, 1 to 0.

Progress counts environment steps of the ``total_timesteps`` of ``learn()``, and the rate is set once an update, before
it. A run that was stopped before its time, saved, and resumed with ``reset_num_timesteps=False`` for the steps that
were left goes on where the schedule was.

Stable-Baselines3 has more in ``stable_baselines3.common.utils``, such as ``LinearSchedule``. A function of yours works
as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupLinear:
    """Rises from 0 to ``start``, then goes to ``end``, both in a straight line; with ``end=start`` it stays there.

    With a warmup, the rate of the very first update is 0.

    Args:
        start: the rate at the end of the warmup, above 0.
        warmup: the share of the training that it takes to get there, at least 0 and below 1.
        end: the rate at the end of the training, at least 0.
    """

    start: float
    warmup: float = 0.05
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.start < math.inf:
            raise ValueError(f"start must be a finite learning rate above 0, got {self.start}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the training, at least 0 and below 1, got {self.warmup}")
        if not 0 <= self.end < math.inf:
            raise ValueError(f"end must be a finite learning rate of at least 0, got {self.end}")

    def __call__(self, progress_remaining: float) -> float:
        done = 1 - progress_remaining
        if done < self.warmup:
            return self.start * done / self.warmup
        return self.end + (self.start - self.end) * self.fall((done - self.warmup) / (1 - self.warmup))

    def fall(self, done: float) -> float:
        """How much of the way from ``start`` to ``end`` is left, 1 to 0, when ``done`` of it is gone, 0 to 1."""
        return 1 - done


@dataclass(frozen=True)
class WarmupCosine(WarmupLinear):
    """Rises from 0 to ``start`` in a straight line, then goes to ``end`` along half a cosine. Options as before."""

    def fall(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2


SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(name: str, learning_rate: float, warmup: float = 0.05) -> WarmupLinear:
    """A schedule by its name on a command line: "constant" stays at the rate after the warmup, the others fall to 0."""
    if name == "constant":
        return WarmupLinear(learning_rate, warmup, end=learning_rate)
    if name == "linear":
        return WarmupLinear(learning_rate, warmup)
    if name == "cosine":
        return WarmupCosine(learning_rate, warmup)
    raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
