"""PANW, Per-Action Normalization Weighting: the loss at each scale is weighted by its number of tokens (section 3.4).

The scales of an image hold 1, 4, 9, ... tokens. A mean over tokens would be dominated by the finest scales.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from agents.common.registry import register
from agents.grpo import GRPO, TokenWeights
from agents.rollout import Rollout
from agents.wrapper import Wrapper
from var_env.schedule import ScaleSchedule


def panw_weights(schedule: ScaleSchedule, alpha: float, steps: range | None = None) -> Tensor:
    """The weight of each token of the grids in ``steps``, all by default: float32 ``(n,)``, summing to one.

    A token of grid t has the weight ``k_t = 1 / (h_t w_t)^alpha`` (eq. 9). All weights are then divided by their sum.
    With ``alpha = 0`` all tokens weigh the same, with ``alpha = 1`` all grids do; above 1 coarse grids weigh more.
    """
    sizes = torch.tensor([schedule.sizes[t] for t in (range(len(schedule)) if steps is None else steps)])
    k = sizes.double() ** -alpha  # eq. 9
    return (k / (k * sizes).sum()).float().repeat_interleave(sizes)


@register("panw")
class PANW(Wrapper):
    """Weights tokens by the size of their grid, so that fine grids do not dominate.

    The weights are `panw_weights` over the grids of an update. All terms of the loss get them: policy, KL and entropy.

    Args:
        agent: the agent to wrap.
    """

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        alpha: Annotated[
            float,
            "the exponent of eq. 9, at least 0. The paper finds 0.6 to 0.8 best.",
        ] = 0.6,
    ) -> None:
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
        super().__init__(agent)
        self.alpha = alpha

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        weights = self.agent.token_weights(rollout, steps)
        k = panw_weights(self.unwrapped.policy.schedule, self.alpha, steps).to(weights.policy)  # (n,)
        k = k * len(k)  # a mean of one, because the weights inside make a mean already
        return TokenWeights(*(part * k for part in weights))
