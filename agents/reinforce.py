"""REINFORCE: the score-function gradient with a baseline, and no ratio (Williams, Machine Learning 8, 1992)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from agents import losses
from agents.common.registry import register
from agents.grpo import GRPO


@register("reinforce")
class REINFORCE(GRPO):
    """REINFORCE with the group's mean as the baseline: GRPO without ratio, clip and std.

    The loss is ``-A log p`` at each token, ``A`` the reward less the group's mean. On-policy, GRPO's ratio is 1 and
    nothing is clipped, so its gradient is ``A`` times that of ``log p`` as well: from GRPO with one epoch and one
    minibatch this differs by the division by the group's standard deviation alone. AdamW forgives a constant factor,
    but here groups whose rewards differ more also weigh more, and rewards on a larger scale reach ``max_grad_norm``.

    GRPO's clip options and ``ratio_level`` have no effect, since there is no ratio.

    Args:
        policy, env: and more keywords, as in `GRPO`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        advantage_scale: Annotated[str, 'only "none", or this would be GRPO.'] = "none",
        epochs: Annotated[
            int,
            "only 1, since after a step the samples are no longer the policy's own.",
        ] = 1,
        minibatches: Annotated[
            int,
            "only 1, since after a step the samples are no longer the policy's own.",
        ] = 1,
        **grpo: Any,
    ) -> None:
        for name, value in (("epochs", epochs), ("minibatches", minibatches)):
            if value != 1:
                raise ValueError(
                    f"{type(self).__name__} learns on-policy and takes {name}=1, got {value!r}: leave it at 1, or use "
                    "GRPO, whose ratio corrects for the steps in between"
                )
        if advantage_scale != "none":
            raise ValueError(
                f"{type(self).__name__} takes advantage_scale='none', got {advantage_scale!r}: use GRPO, which divides"
            )
        super().__init__(policy, env, advantage_scale=advantage_scale, **grpo)

    def policy_loss(self, logp: Tensor, old: Tensor, advantages: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        return losses.likelihood_loss(logp, advantages), torch.ones_like(logp)  # new and old policy are the same
