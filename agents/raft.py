"""RAFT: imitate the best samples (Dong et al., 2023, arXiv 2304.06767)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from agents import losses
from agents.common.checks import require_at_least
from agents.common.registry import register
from agents.grpo import GRPO
from agents.rollout import Rollout


@register("raft")
class RAFT(GRPO):
    """RAFT: supervised fine-tuning on the best images of each prompt, by rejection sampling.

    Of each prompt's G images the ``keep`` best are kept, and the loss is ``-log p`` of their tokens, the mean over
    the kept images, with GRPO's KL. Their advantage is 1 and that of the others 0. The others are not computed, which
    makes an update ``G / keep`` times as cheap; the reward calls are the same.

    Of equal rewards the first drawn is kept. A prompt whose rewards are all equal has no best image and is left out,
    as everywhere else. When that is so for all prompts, only the KL is learned, from all images.

    Likelihood needs no ratio, and so several ``epochs`` are fine. GRPO's clip options and ``ratio_level`` have no
    effect, and neither have ``advantage_scale`` and ``advantage_eps``.

    Args:
        policy, env: and more keywords, as in `GRPO`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        keep: Annotated[int, "images of each prompt to imitate, below ``group_size``."] = 1,
        group_size: int = 8,
        **grpo: Any,
    ) -> None:
        require_at_least(1, keep=keep, group_size=group_size)
        if keep >= group_size:
            raise ValueError(
                f"keep must be below group_size, {group_size}, got {keep}: to imitate all samples teaches nothing"
            )
        super().__init__(policy, env, group_size=group_size, **grpo)
        self.keep = keep

    def while_scored(self, rollout: Rollout) -> Rollout:
        return rollout  # only the scores tell which few rows are learned

    def kept(self, rollout: Rollout) -> Tensor:
        """The rows to imitate, int64 ``(P', keep)``, for the P' prompts whose rewards differ."""
        scores = rollout.scores.cpu()  # (P, G)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        rows = torch.arange(len(scores))[:, None] * scores.shape[1] + best  # (P, keep)
        return rows[~losses.zero_variance(scores)]

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        chosen = torch.zeros(rollout.scores.numel())  # (B,)
        chosen[self.kept(rollout)] = 1.0
        return chosen

    def update(self, rollout: Rollout, advantages: Tensor, steps: range) -> None:
        rows = self.kept(rollout)
        if len(rows):
            rollout = rollout.rows(self.policy, rows)
            advantages = advantages[rows.flatten().to(advantages.device)]
        super().update(rollout, advantages, steps)

    def policy_loss(self, logp: Tensor, old: Tensor, advantages: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        return losses.likelihood_loss(logp, advantages), losses.policy_ratio(logp.detach(), old)
