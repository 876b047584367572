"""The log-probabilities of a rollout's tokens under the policy (old and new) and under the reference.

All of them are teacher-forced, conditional and untruncated. They never come from the sampler, because guidance and
truncation change its distribution. With soft codes the ratio, old and new, is of the tokens' neighbourhoods; the KL to
the reference stays the plain one of the tokens. Rows are computed in micro-batches, to fit the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from agents import losses, soft_codes
from agents.base import Agent
from agents.common.checks import require_above, require_at_least, require_choice
from agents.losses import Predicted
from agents.policies.base import Policy
from agents.rollout import Rollout
from agents.trainable import frozen_copy

KL_PLACES = ("loss", "reward")


class LogProbs(Agent):
    """An agent that learns from the log-probabilities of its samples and may have a frozen reference policy.

    Args:
        policy, env: and more keywords, as in `Agent`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        kl_coef: Annotated[
            float,
            "weight of the KL to the reference, which is the policy as it was given; 0: no KL.",
        ] = 0.02,
        kl: Annotated[
            str,
            '"k1", "k2", "k3" or "full", see ``losses.KL_ESTIMATES`` and ``losses.full_kl``.',
        ] = "k3",
        kl_in: Annotated[
            str,
            '"loss" adds the KL of each token to the loss; "reward" takes the sum over a row\'s tokens off its '
            'score, before advantages are made, as RLHF does; "k1" is the usual estimate there.',
        ] = "loss",
        support: Annotated[
            str,
            '"model" learns with the model\'s own log-probabilities; "sampler" renormalises them on the tokens '
            "that a truncated sampler could draw, frozen at sampling. Pushing down truncated samples otherwise "
            "leaks probability to tokens that are never shown, so truncated training needs this or a strong KL.",
        ] = "model",
        soft_codes: Annotated[
            float | None,
            "the ratio's log-probabilities are those of a token's neighbourhood in the codebook, of this width in "
            "units of the distance to the nearest code (``agents/soft_codes.py``); the KL to the reference stays that "
            "of tokens. Holds a table of V x V numbers. ``None``: of the token alone.",
        ] = None,
        micro_batch: Annotated[
            int | None,
            "rows in one forward and backward, to fit the memory (gradient accumulation); leaves the update unchanged.",
        ] = None,
        logit_chunk: Annotated[
            int | None,
            "tokens of an image whose logits exist at a time; leaves the update unchanged, but for rounding. "
            'For large vocabularies; not with ``kl="full"`` and ``support="sampler"``. ``None``: all.',
        ] = None,
        recompute: Annotated[
            bool,
            "gradient checkpointing: the backward pass computes the policy's layers again. Leaves the update "
            "unchanged, and takes up to a third longer.",
        ] = False,
        **common: Any,
    ) -> None:
        require_choice((*losses.KL_ESTIMATES, "full"), kl=kl)
        require_choice(KL_PLACES, kl_in=kl_in)
        require_choice(("model", "sampler"), support=support)
        require_above(0.0, soft_codes=soft_codes)
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef must be at least 0, got {kl_coef}")
        require_at_least(1, micro_batch=1 if micro_batch is None else micro_batch)
        require_at_least(1, logit_chunk=1 if logit_chunk is None else logit_chunk)
        self.kl_coef, self.kl, self.kl_in, self.soft_codes = kl_coef, kl, kl_in, soft_codes
        self.support, self.micro_batch, self.logit_chunk, self.recompute = support, micro_batch, logit_chunk, recompute
        if logit_chunk is not None and self.needs_everything is not None:
            raise ValueError(
                f"{self.needs_everything} needs all log-probabilities at once: leave out logit_chunk={logit_chunk}"
            )
        super().__init__(policy, env, **common)

    def _setup_model(self) -> None:
        if self.recompute:
            self.policy.recompute_activations()
        super()._setup_model()
        self._kernel: Tensor | None = None
        if self.soft_codes is not None:
            self._kernel = soft_codes.log_kernel(self.policy.tokenizer.code_distances(), self.soft_codes)  # (V, V)
        if self.kl_coef:
            self.require_reference()

    @property
    def needs_everything(self) -> str | None:
        """The option, if any, that needs the log-probabilities of the whole vocabulary at each place."""
        if self.kl == "full":
            return "kl='full'"
        if self.soft_codes is not None:
            return f"soft_codes={self.soft_codes}"
        return "support='sampler'" if self.support == "sampler" else None

    @property
    def keeps_support(self) -> bool:
        return self.support == "sampler"

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_kernel"]

    def require_reference(self) -> Policy:
        """The frozen reference policy. If there is none yet, it becomes a copy of the policy as it is now."""
        if self.reference is None:
            self.reference = frozen_copy(self.policy)
        return self.reference

    def log_probs(self, policy: Policy, rollout: Rollout, rows: Tensor, steps: range) -> Predicted:
        """A policy's log-probabilities and entropies of the tokens of ``steps`` in some rows, ``(b, n)``.

        Where `needs_everything`, those of the whole vocabulary are there as well. With soft codes, those of the tokens'
        neighbourhoods are there for the policy that learns.
        """
        cond = policy.take(rollout.cond, rows)
        grids = [grid[rows] for grid in rollout.grids[: steps.stop]]
        if self.needs_everything is None:
            if self.logit_chunk is not None:
                policy.logit_chunk = self.logit_chunk  # here, where every reference passes, a file's too
            logp, entropy = policy.evaluate(cond, grids, steps)  # (b, n, D)
            return Predicted(logp.sum(-1), entropy.sum(-1))
        parts = [rollout.draws[t].support for t in steps] if self.support == "sampler" else [None]
        support = None if parts[0] is None else torch.cat([part[rows] for part in parts if part is not None], 1)
        chosen = torch.cat([grids[t] for t in steps], 1)  # (b, n, D)
        found = losses.log_probs(policy(cond, grids, steps), chosen, support)
        if self._kernel is None or policy is not self.policy:
            return found
        assert found.everything is not None
        return found._replace(soft=soft_codes.neighbourhood_logp(found.everything, chosen, self._kernel))

    def logp(self, policy: Policy, filled: Tensor | None, rollout: Rollout, rows: Tensor, steps: range) -> Tensor:
        """Log-probabilities of some rows, ``(b, n)``: those in ``filled``, ``(B, n)``; computed if it is ``None``."""
        return self.log_probs(policy, rollout, rows, steps).logp if filled is None else filled[rows]

    def old_log_probs(self, rollout: Rollout, steps: range) -> Tensor:
        """Log-probabilities before the first optimiser step, ``(B, n)``."""
        return self.all_log_probs(self.policy, rollout, steps)

    @torch.no_grad()
    def old_soft_log_probs(self, rollout: Rollout, steps: range) -> tuple[Tensor, Tensor]:
        """With soft codes: `old_log_probs`, and those of the tokens' neighbourhoods, ``(B, n)`` each."""

        def both(rows: Tensor) -> Tensor:
            found = self.log_probs(self.policy, rollout, rows, steps)
            return torch.stack([found.logp, found.compared], 1)

        plain, soft = self.in_micro_batches(both, rollout).unbind(1)
        return plain, soft

    @torch.no_grad()
    def all_log_probs(self, policy: Policy, rollout: Rollout, steps: range) -> Tensor:
        """Log-probabilities of all rows, without gradient, ``(B, n)``."""
        return self.in_micro_batches(lambda rows: self.log_probs(policy, rollout, rows, steps).logp, rollout)

    def kl_to_reference(self, rollout: Rollout, rows: Tensor, steps: range, new: Predicted | None = None) -> Tensor:
        """The KL of the policy to the reference at each token of some rows, ``(b, n)``."""
        assert self.reference is not None
        if self.kl != "full":
            logp = self.logp(self.policy, rollout.old_logp, rollout, rows, steps) if new is None else new.logp
            with torch.no_grad():
                ref_logp = self.logp(self.reference, rollout.ref_logp, rollout, rows, steps)
            return losses.kl_estimate(logp, ref_logp, self.kl)
        new = new or self.log_probs(self.policy, rollout, rows, steps)
        with torch.no_grad():
            ref = self.log_probs(self.reference, rollout, rows, steps)
        assert new.everything is not None and ref.everything is not None
        return losses.full_kl(new.everything, ref.everything)

    def in_micro_batches(
        self, function: Callable[[Tensor], Tensor], rollout: Rollout, rows: Tensor | None = None
    ) -> Tensor:
        """Apply a function of rows, int64 ``(b,)``, to some rows, by default to all B, and join the results."""
        rows = torch.arange(len(rollout.scenes), device=self.device) if rows is None else rows
        return torch.cat([function(rows[piece]) for piece in self.pieces(len(rows))])

    def pieces(self, rows: int) -> list[slice]:
        """The micro-batches of so many rows. With sharded weights every process must compute as often as the others,
        so each has the same number of micro-batches, of which some may be empty."""
        size = self.micro_batch or max(rows, 1)
        found = [slice(start, start + size) for start in range(0, rows, size)]
        if self.processes.shards:
            found += [slice(0, 0)] * (self.processes.most(len(found)) - len(found))
        return found
