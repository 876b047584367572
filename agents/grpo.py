"""GRPO, the paper's baseline: one advantage a picture, for all of its tokens (DeepSeekMath, arXiv 2402.03300).

An iteration, in this file's order:

1. `sample` G pictures for each of P prompts and score them;
2. `scores`: what each row is worth, the reward and what is added to it;
3. `advantages`: the score, normalised within the prompt's group;
4. `token_advantages` and `token_weights`: what this means for each token, and how much the token counts;
5. `update`: clipped policy gradient on every token, held near a frozen reference by a KL penalty.

Other algorithms replace some of these methods, and wrappers change what 2 and 4 return.

Old, new and reference log-probabilities come from one function, teacher-forced, conditional and untruncated, never
from the sampler, whose distribution is another one under guidance or truncation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from agents import logs, losses
from agents.base import Agent, StopLearning, frozen_copy
from agents.common.checks import require_at_least, require_choice
from agents.common.registry import register
from agents.losses import Predicted
from agents.policies.base import Policy
from agents.rollout import Rollout

if TYPE_CHECKING:
    from agents.wrapper import Wrapper

KL_PLACES = ("loss", "reward")
DYNAMIC_SAMPLING = ("keep", "drop", "resample")


class TokenWeights(NamedTuple):
    """How much each token counts in the terms of an update, each ``(B, n)``, n the tokens of its steps."""

    policy: Tensor
    kl: Tensor
    entropy: Tensor  # of the entropy bonus

    def rows(self, index: Tensor) -> TokenWeights:
        """Those of some rows."""
        return TokenWeights(*(part[index] for part in self))


@register("grpo")
class GRPO(Agent):
    """Group relative policy optimisation: a reward against those of its group, for all tokens.

    Args:
        policy, env: and more keywords, as in `Agent`.
        clip_range: the ratio may move the loss within ``1 +- clip_range``.
        clip_range_high: the upper end is ``1 + clip_range_high``; DAPO's clip-higher. ``None``: the same.
        dual_clip: c, above 1: bounds the loss of a negative advantage, see ``losses.clipped_loss``. ``None``: without.
        kl_coef: weight of the KL to the reference, the policy as it was given; 0 is without.
        kl: "k1", "k2", "k3" or "full", see ``losses.KL_ESTIMATES`` and ``losses.full_kl``.
        kl_in: "loss" adds the KL of each token to the loss; "reward" takes the sum over a row's tokens off its score,
            before advantages are made, as RLHF does; "k1" is the usual estimate there.
        entropy_coef: weight of the entropy bonus, the policy's entropy at each token in the loss.
        ratio_level: a name in ``losses.RATIO_LEVELS``: "token", "grid" (GMPO) or "sequence" (GSPO).
        aggregation: a name in ``losses.AGGREGATIONS``, what the loss is a mean of: "constant" (Dr. GRPO's),
            "token_mean" (DAPO's), "sequence_mean" (GRPO's) or "step_mean". All rows have the same tokens, so the first
            three differ only where a mask takes tokens away.
        advantage_scale: a name in ``losses.ADVANTAGE_SCALES``: "group", "batch" or "none" (Dr. GRPO).
        advantage_eps: added to the standard deviation.
        dynamic_sampling: what becomes of groups whose rewards are all equal, which teach nothing. "keep" them under
            their KL term; "drop" them; "resample" other prompts until the batch is full (DAPO, section 3.2).
        max_batches: "resample" draws at most so many batches an update. Their pictures all count as budget.
        support: "model" learns with the model's own log-probabilities; "sampler" renormalises them on the codes that a
            truncated sampler could draw, frozen at sampling. Pushing down truncated samples otherwise leaks
            probability to codes that are never shown, so truncated training needs this or a strong KL.
        epochs: passes over a rollout.
        minibatches: optimiser steps an epoch.
        micro_batch: rows in one forward and backward, to fit the memory (gradient accumulation); leaves the update
            unchanged.
        logit_chunk: tokens of a picture whose logits exist at a time; leaves the update unchanged, but for rounding.
            For large vocabularies; not with ``kl="full"`` and ``support="sampler"``. ``None``: all.
        recompute: gradient checkpointing: the backward pass computes the policy's layers again. Leaves the update
            unchanged, and takes up to a third longer.
        target_kl: an update ends before an optimiser step at which the policy's KL from the one that sampled, estimated
            on the minibatch, is above 1.5 times this (as in Stable-Baselines3). ``None``: never.
        refresh_reference: updates after which the reference becomes the policy as it then is; 0 for never.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        clip_range: float = 0.2,
        clip_range_high: float | None = None,
        dual_clip: float | None = None,
        kl_coef: float = 0.02,
        kl: str = "k3",
        kl_in: str = "loss",
        entropy_coef: float = 0.0,
        ratio_level: str = "token",
        aggregation: str = "constant",
        advantage_scale: str = "group",
        advantage_eps: float = 1e-4,
        dynamic_sampling: str = "keep",
        max_batches: int = 4,
        support: str = "model",
        epochs: int = 1,
        minibatches: int = 1,
        micro_batch: int | None = None,
        logit_chunk: int | None = None,
        recompute: bool = False,
        target_kl: float | None = None,
        refresh_reference: int = 0,
        **common: Any,
    ) -> None:
        require_choice((*losses.KL_ESTIMATES, "full"), kl=kl)
        require_choice(KL_PLACES, kl_in=kl_in)
        require_choice(losses.RATIO_LEVELS, ratio_level=ratio_level)
        require_choice(losses.AGGREGATIONS, aggregation=aggregation)
        require_choice(losses.ADVANTAGE_SCALES, advantage_scale=advantage_scale)
        require_choice(DYNAMIC_SAMPLING, dynamic_sampling=dynamic_sampling)
        require_choice(("model", "sampler"), support=support)
        require_at_least(
            1, epochs=epochs, minibatches=minibatches, micro_batch=1 if micro_batch is None else micro_batch
        )
        require_at_least(1, max_batches=max_batches, logit_chunk=1 if logit_chunk is None else logit_chunk)
        require_at_least(0, refresh_reference=refresh_reference)
        for name, number, least in (
            ("clip_range", clip_range, 0.0),
            ("clip_range_high", clip_range_high, 0.0),
            ("dual_clip", dual_clip, 1.0),
            ("target_kl", target_kl, 0.0),
        ):
            if number is not None and not number > least:
                raise ValueError(f"{name} must be above {least:g}, got {number}")
        if not kl_coef >= 0 or not entropy_coef >= 0:
            raise ValueError(f"kl_coef and entropy_coef must be at least 0, got {kl_coef} and {entropy_coef}")
        if logit_chunk is not None and (kl == "full" or support == "sampler"):
            other = "kl='full'" if kl == "full" else "support='sampler'"
            raise ValueError(f"{other} needs all log-probabilities at once: leave out logit_chunk={logit_chunk}")
        self.clip_range, self.clip_range_high, self.dual_clip = clip_range, clip_range_high, dual_clip
        self.kl_coef, self.kl, self.kl_in, self.entropy_coef = kl_coef, kl, kl_in, entropy_coef
        self.ratio_level, self.aggregation = ratio_level, aggregation
        self.advantage_scale, self.advantage_eps = advantage_scale, advantage_eps
        self.dynamic_sampling, self.max_batches, self.support = dynamic_sampling, max_batches, support
        self.epochs, self.minibatches, self.micro_batch = epochs, minibatches, micro_batch
        self.logit_chunk, self.recompute = logit_chunk, recompute
        self.target_kl, self.refresh_reference = target_kl, refresh_reference
        self.outermost: GRPO | Wrapper = self
        super().__init__(policy, env, **common)

    @property
    def wrappers(self) -> list[Wrapper]:
        found, agent = [], self.outermost
        while not isinstance(agent, GRPO):
            found.append(agent)
            agent = agent.agent
        return found[::-1]

    def _setup_model(self) -> None:
        if self.recompute:
            self.policy.recompute_activations()
        super()._setup_model()
        if self.kl_coef:
            self.require_reference()

    def require_reference(self) -> Policy:
        """The frozen reference policy, made from the policy as it is if there is none yet."""
        if self.reference is None:
            self.reference = frozen_copy(self.policy)
        return self.reference

    @property
    def keeps_support(self) -> bool:
        return self.support == "sampler"

    # 1. Sampling -----------------------------------------------------------------------------------------------------

    def iterate(self) -> None:
        self.learn_from(self.sample(), range(len(self.policy.schedule)))

    def sample(self) -> Rollout:
        """New prompts, their pictures and scores; with ``dynamic_sampling``, only groups whose rewards differ."""
        rollout = super().sample()
        if self.dynamic_sampling == "keep":
            return rollout
        batches, wanted = 1, len(rollout.scores)
        kept = [rollout.groups(self.policy, ~losses.zero_variance(rollout.scores))]
        while self.dynamic_sampling == "resample" and not self._stop and batches < self.max_batches:
            if not self.processes.any(sum(len(part.scores) for part in kept) < wanted):
                break
            try:
                more = super().sample()
            except StopLearning:  # a callback wants no more: learn from what there is
                break
            batches += 1
            kept.append(more.groups(self.policy, ~losses.zero_variance(more.scores)))
        useful = Rollout.concatenate(self.policy, kept)
        self.logger.record("rollout/batches", batches)
        self.logger.record("rollout/groups_kept", len(useful.scores))
        if len(useful.scores) == 0:
            return rollout  # nothing to learn but the KL
        return useful.groups(self.policy, torch.arange(len(useful.scores)) < wanted)

    def while_scored(self, rollout: Rollout) -> Rollout:
        return self.look_ahead(rollout, range(len(self.policy.schedule)))

    @torch.no_grad()
    def look_ahead(self, rollout: Rollout, steps: range) -> Rollout:
        """The rollout with the log-probabilities without gradient that an update of ``steps`` asks for, see `logp`."""
        kl = bool(self.kl_coef) and self.kl != "full"
        asked = [self.reference] if kl and self.reference is not None else []
        if not self.one_step or (kl and self.kl_in == "reward"):
            asked.append(self.policy)
        for policy in asked:
            if rollout.known("logp", policy, steps) is None:
                logp = self.in_micro_batches(partial(self.logp, policy, rollout, steps=steps), rollout)  # (B, n)
                rollout = rollout.with_ahead("logp", policy, steps, logp)
        return rollout

    # 2 to 4. From rewards to tokens ----------------------------------------------------------------------------------

    def learn_from(self, rollout: Rollout, steps: range) -> None:
        """One update of the grids in ``steps`` from a rollout, wrappers included."""
        start = time.perf_counter()
        rollout = self.judge(rollout, steps)
        advantages = self.outermost.token_advantages(rollout, steps)
        self.seconds += time.perf_counter() - start
        self.update(rollout, advantages, steps)

    def judge(self, rollout: Rollout, steps: range) -> Rollout:
        """The rollout with its ``scores`` as the agent sees them, and with its ``advantages``."""
        rollout = replace(rollout, scores=self.outermost.scores(rollout, steps))
        return replace(rollout, advantages=self.advantages(rollout, steps).to(self.device))

    def scores(self, rollout: Rollout, steps: range) -> Tensor:
        """A hook of the wrappers: what each row is worth, ``(P, G)``. Here its reward, less the KL if asked for."""
        if not self.kl_coef or self.kl_in == "loss":
            return rollout.scores
        with torch.no_grad():
            kl = self.in_micro_batches(lambda rows: self.kl_to_reference(rollout, rows, steps).sum(1), rollout)  # (B,)
        self.logger.record("rollout/kl", kl.mean().item())
        return rollout.scores - self.kl_coef * kl.view_as(rollout.scores).to(rollout.scores)

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """How much better than expected each row is, ``(B,)``, or each of its tokens, ``(B, n)``: the algorithm's."""
        scores = self.processes.gather(rollout.scores)  # "batch" looks at all of them
        advantages = losses.group_advantages(scores, self.advantage_eps, scale=self.advantage_scale)
        return self.processes.mine(advantages, len(rollout.scores)).flatten()

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """A hook of the wrappers: the advantage of each token of ``steps``, ``(B, n)``."""
        assert rollout.advantages is not None, "judge() it first"
        n = sum(self.policy.schedule.sizes[t] for t in steps)
        return rollout.advantages if rollout.advantages.ndim == 2 else rollout.advantages[:, None].expand(-1, n)

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        """A hook of the wrappers: how much each token of ``steps`` counts against the others.

        Here all count the same, and rows sum to one. A wrapper multiplies what this returns: by weights with a mean of
        one to shift attention, by a mask to gate. ``aggregation`` then says what the loss is a mean of.
        """
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        uniform = losses.uniform_weights(len(rollout.scenes), sizes, self.device)
        return TokenWeights(uniform, uniform, uniform)

    def aggregate(self, weights: TokenWeights, steps: range) -> TokenWeights:
        """The weights of the rows of one optimiser step, such that its loss is the sum of weight times value."""
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        return TokenWeights(*(losses.AGGREGATIONS[self.aggregation](part, sizes) for part in weights))

    # 5. The update ---------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, advantages: Tensor, steps: range) -> None:
        """Learn from a rollout and its advantages, ``(B,)`` or ``(B, n)``; gradients reach the grids in ``steps``.

        Nothing after ``steps`` is computed and nothing before it is predicted, so a rollout need only hold the grids up
        to ``steps.stop``.
        """
        with self.updating():
            seen, norms = self.descend(rollout, advantages.to(self.device), steps)
        if self.refresh_reference and self.n_updates % self.refresh_reference == 0 and self.reference is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.reference.parameters()), list(self.policy.parameters()))
        if norms:  # or all steps were skipped
            logs.record_update(self.logger, seen, len(norms), steps, self.policy.schedule, self)
            self.logger.record("train/grad_norm", sum(norms) / len(norms))
        self.logger.record("train/optimizer_steps", len(norms))

    def descend(self, rollout: Rollout, advantages: Tensor, steps: range) -> tuple[list[logs.Tokens], list[float]]:
        """The optimiser steps of an update: what they saw at their tokens, and the norms of their gradients."""
        rows, together = len(advantages), self.processes
        weights = TokenWeights(*(together.gather(part) for part in self.outermost.token_weights(rollout, steps)))
        before = together.rows_before(rows)  # of the rows of all processes, which the minibatches are made of
        old: Tensor | None = None  # (B, n)
        if not self.one_step:
            rollout = self.look_ahead(rollout, steps)  # once for all optimiser steps
            old = self.old_log_probs(rollout, steps)
        seen: list[logs.Tokens] = []
        norms: list[float] = []
        for minibatch in self.minibatch_rows(len(weights.policy), shuffle=not self.one_step):
            own = ((minibatch >= before) & (minibatch < before + rows)).nonzero().flatten()
            shares = self.aggregate(weights.rows(minibatch), steps).rows(own)  # (b, n)
            mine = minibatch[own] - before
            here: list[logs.Tokens] = []
            total = torch.zeros((), device=self.device)
            self.optimizer.zero_grad()
            for part in self.in_pieces(self.places_to_learn(advantages[mine])):
                micro = mine[part]
                given = None if old is None else old[micro]
                loss, tokens = self.loss(rollout, micro, advantages[micro], shares.rows(part), given, steps)
                together.scaled(loss).backward()
                total += loss.detach()
                here.append(tokens)
            if self.target_kl is not None and norms and logs.approx_kl(here, together) > 1.5 * self.target_kl:
                self.optimizer.zero_grad()
                break
            norm = self.optimizer_step(total)
            if math.isfinite(norm):
                norms.append(norm)
                seen += here
        return seen, norms

    @property
    def one_step(self) -> bool:
        """Whether an update is one optimiser step: the policy of its loss is then the one that sampled."""
        return self.epochs == self.minibatches == 1

    def loss(
        self,
        rollout: Rollout,
        rows: Tensor,
        advantages: Tensor,
        weights: TokenWeights,
        old: Tensor | None,
        steps: range,
    ) -> tuple[Tensor, logs.Tokens]:
        """The share of some rows in the loss of an optimiser step, and what was seen at their tokens.

        Args:
            rows: int64, which rows of the rollout; ``b`` of them.
            advantages: theirs, ``(b,)`` or ``(b, n)``.
            weights: theirs, aggregated, ``(b, n)`` each.
            old: their log-probabilities under the policy that sampled, ``(b, n)``; ``None`` when it is this one.
        """
        new = self.log_probs(self.policy, rollout, rows, steps)  # (b, n)
        old = new.logp.detach() if old is None else old
        policy_loss, ratio = self.policy_loss(new.logp, old, advantages, steps)  # (b, n)
        kl_weight = weights.kl * (self.kl_coef if self.kl_in == "loss" else 0.0)
        entropy_weight = weights.entropy * self.entropy_coef
        kl = torch.zeros_like(policy_loss)
        if self.kl_coef and self.kl_in == "loss":
            kl = self.kl_to_reference(rollout, rows, steps, new)
        loss = (weights.policy * policy_loss).sum() + (kl_weight * kl).sum()
        if self.entropy_coef:  # a weight of zero would still cost its backward pass
            loss = loss - (entropy_weight * new.entropy).sum()
        behaviour = torch.cat([rollout.behaviour_logp[t][rows] for t in steps], 1).sum(-1)  # (b, n)
        seen = (policy_loss, kl, new.entropy, weights.policy, kl_weight, entropy_weight, ratio, behaviour - old)
        return loss, logs.Tokens(*(part.detach() for part in seen))

    def policy_loss(self, logp: Tensor, old: Tensor, advantages: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        """The policy term at each token and the ratio in it, ``(b, n)`` both."""
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        ratio = losses.policy_ratio(logp, old, self.ratio_level, sizes)
        return losses.clipped_loss(ratio, advantages, self.clip_range, self.clip_range_high, self.dual_clip), ratio

    def kl_to_reference(self, rollout: Rollout, rows: Tensor, steps: range, new: Predicted | None = None) -> Tensor:
        """The KL of the policy to the reference at each token of some rows, ``(b, n)``."""
        assert self.reference is not None
        if self.kl != "full":
            logp = self.logp(self.policy, rollout, rows, steps) if new is None else new.logp
            with torch.no_grad():
                ref_logp = self.logp(self.reference, rollout, rows, steps)
            return losses.kl_estimate(logp, ref_logp, self.kl)
        new = new or self.log_probs(self.policy, rollout, rows, steps)
        with torch.no_grad():
            ref = self.log_probs(self.reference, rollout, rows, steps)
        assert new.everything is not None and ref.everything is not None
        return losses.full_kl(new.everything, ref.everything)

    def log_probs(self, policy: Policy, rollout: Rollout, rows: Tensor, steps: range) -> Predicted:
        """What a policy says of the tokens of ``steps`` in some rows, ``(b, n)``, and where an option needs them all
        log-probabilities. The one source of old, new and reference log-probabilities."""
        cond = policy.take(rollout.cond, rows)
        grids = [grid[rows] for grid in rollout.grids[: steps.stop]]
        if self.support == "model" and self.kl != "full":
            if self.logit_chunk is not None:
                policy.logit_chunk = self.logit_chunk  # here, where every reference passes, a file's too
            logp, entropy = policy.evaluate(cond, grids, steps)  # (b, n, D)
            return Predicted(logp.sum(-1), entropy.sum(-1))
        parts = [rollout.support[t] for t in steps] if self.support == "sampler" else [None]
        support = None if parts[0] is None else torch.cat([part[rows] for part in parts if part is not None], 1)
        chosen = torch.cat([grids[t] for t in steps], 1)  # (b, n, D)
        return losses.log_probs(policy(cond, grids, steps), chosen, support)

    def logp(self, policy: Policy, rollout: Rollout, rows: Tensor, steps: range) -> Tensor:
        """The log-probabilities of `log_probs`, ``(b, n)``; those of `look_ahead`, without gradient, if they hold."""
        known = rollout.known("logp", policy, steps)  # (B, n)
        return self.log_probs(policy, rollout, rows, steps).logp if known is None else known[rows]

    @torch.no_grad()
    def old_log_probs(self, rollout: Rollout, steps: range) -> Tensor:
        """Log-probabilities before the first optimiser step, ``(B, n)``."""
        return self.in_micro_batches(partial(self.logp, self.policy, rollout, steps=steps), rollout)

    def in_micro_batches(
        self, function: Callable[[Tensor], Tensor], rollout: Rollout, rows: Tensor | None = None
    ) -> Tensor:
        """A function of rows, int64 ``(b,)``, over some of them; by default over all B."""
        rows = torch.arange(len(rollout.scenes), device=self.device) if rows is None else rows
        return torch.cat([function(part) for part in self.in_pieces(rows)])

    def in_pieces(self, rows: Tensor) -> list[Tensor]:
        """Rows in micro-batches. With sharded weights, which all processes compute with together, there are as many in
        each process, some of them perhaps empty."""
        pieces = list(rows.split(self.micro_batch or max(len(rows), 1))) if len(rows) else []
        if self.processes.shards:
            pieces += [rows[:0]] * (self.processes.most(len(pieces)) - len(pieces))
        return pieces

    def minibatch_rows(self, rows: int, shuffle: bool) -> Iterator[Tensor]:
        """The rows of each optimiser step of an update, epoch after epoch."""
        for _ in range(self.epochs):
            order = torch.arange(rows, device=self.device)
            if shuffle:
                order = torch.randperm(rows, generator=self.generator, device=self.device)
            yield from order.chunk(self.minibatches)

    def places_to_learn(self, advantages: Tensor) -> Tensor:
        """Where in a minibatch there is anything to learn, int64. With neither KL nor entropy in the loss, rows of zero
        advantage have zero gradient and are left out; one stays, for its zeros."""
        everything = torch.arange(len(advantages), device=self.device)
        if (self.kl_coef and self.kl_in == "loss") or self.entropy_coef:
            return everything
        kept = everything[(advantages != 0).flatten(1).any(1) if advantages.ndim == 2 else advantages != 0]
        return kept if len(kept) else everything[:1]
