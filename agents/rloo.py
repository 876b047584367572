"""RLOO: REINFORCE whose baseline leaves the sample itself out (Ahmadian et al., 2024, arXiv 2402.14740)."""

from __future__ import annotations

from torch import Tensor

from agents import losses
from agents.common.registry import register
from agents.reinforce import REINFORCE
from agents.rollout import Rollout


@register("rloo")
class RLOO(REINFORCE):
    """REINFORCE with the mean of the group's other images as the baseline.

    This baseline does not depend on the sample, and so the gradient is unbiased, where the group's mean shrinks it. But
    by the same factor for all: the advantage is REINFORCE's times ``G / (G - 1)``.

    Args:
        policy, env: and more keywords, as in `REINFORCE`.
    """

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        return losses.leave_one_out(rollout.scores).flatten()
