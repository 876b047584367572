"""GRPO, the paper's baseline: all tokens of an image share one advantage (DeepSeekMath, arXiv 2402.03300).

An iteration has five steps, and this file defines them in their order:

1. `sample` draws G images for each of P prompts and scores them.
2. `scores` gives what each row is worth: its reward, and what is added to it.
3. `advantages` normalises the scores within each prompt's group.
4. `token_advantages` and `token_weights` give each token its advantage and its weight in the loss.
5. `update` follows a clipped policy gradient. A KL penalty holds the policy near a frozen reference.

Other algorithms override some of these methods. Wrappers change what steps 2 and 4 return (`Hooks`).
``log_probs.py`` computes the log-probabilities of policy and reference; ``losses.py`` has the formulas.

The methods count four things:

- *row*, 0 to B - 1: a sample of this process's rollout. Row ``p * G + g`` is sample g of prompt p.
- *global row*: a row among those of all processes, the first process's first. Minibatches are drawn from global rows,
  and so do not depend on the number of processes.
- *place*: the position of a row in a minibatch. The weights of a minibatch are divided over all of its places.
- *token*, 0 to n - 1: a column, over the tokens of the grids in ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor

from agents import logs, losses
from agents.common.checks import require_above, require_at_least, require_choice
from agents.common.registry import register
from agents.dynamic_sampling import sample_useful
from agents.hooks import Hooks
from agents.kl_step import next_factor
from agents.log_probs import LogProbs
from agents.losses import TokenWeights
from agents.rollout import Rollout, weights_version

DYNAMIC_SAMPLING = ("keep", "drop", "resample")


@register("grpo")
class GRPO(LogProbs):
    """Group relative policy optimisation: rewards are compared within a prompt's group.

    Args:
        policy, env: and more keywords, as in `LogProbs` and `Agent`.
    """

    min_group_size = 2

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        clip_range: Annotated[float, "the ratio may move the loss within ``1 +- clip_range``."] = 0.2,
        clip_range_high: Annotated[
            float | None, "the upper end is ``1 + clip_range_high``; DAPO's clip-higher. ``None``: the same."
        ] = None,
        dual_clip: Annotated[
            float | None,
            "c, above 1: bounds the loss of a negative advantage, see ``losses.clipped_loss``. ``None``: without.",
        ] = None,
        entropy_coef: Annotated[float, "weight of the entropy bonus, the policy's entropy at each token."] = 0.0,
        ratio_level: Annotated[str, 'of ``losses.RATIO_LEVELS``: "token", "grid" (GMPO), "sequence" (GSPO).'] = "token",
        aggregation: Annotated[
            str,
            'a name in ``losses.AGGREGATIONS``, what the loss is a mean of: "constant" (Dr. GRPO\'s), '
            '"token_mean" (DAPO\'s), "sequence_mean" (GRPO\'s) or "step_mean". All rows have the same tokens, so '
            "the first three differ only where a mask takes tokens away.",
        ] = "constant",
        advantage_scale: Annotated[
            str, 'a name in ``losses.ADVANTAGE_SCALES``: "group", "batch" or "none" (Dr. GRPO).'
        ] = "group",
        advantage_eps: Annotated[float, "added to the standard deviation."] = 1e-4,
        dynamic_sampling: Annotated[
            str,
            'what becomes of groups whose rewards are all equal, which teach nothing. "keep" them under their '
            'KL term; "drop" them; "resample" other prompts until the batch is full (DAPO, section 3.2).',
        ] = "keep",
        max_batches: Annotated[
            int, '"resample" draws at most so many batches an update. Their images all count as budget.'
        ] = 4,
        epochs: Annotated[int, "passes over a rollout."] = 1,
        minibatches: Annotated[int, "optimiser steps an epoch."] = 1,
        target_kl: Annotated[
            float | None,
            "an update ends before an optimiser step at which the policy's KL from the one that sampled, "
            "estimated on the minibatch, is above 1.5 times this (as in Stable-Baselines3). ``None``: never.",
        ] = None,
        kl_per_update: Annotated[
            float | None,
            "adapts the learning rate: it is divided by 1.5 after an update whose KL, policy before to policy after, "
            "a mean over tokens, is above twice this, and multiplied by 1.5 when it is below half. Takes two more "
            "forward passes. ``None``: the learning rate as it is given.",
        ] = None,
        refresh_reference: Annotated[
            int, "updates after which the reference becomes the policy as it then is; 0 for never."
        ] = 0,
        **common: Any,
    ) -> None:
        require_choice(losses.RATIO_LEVELS, ratio_level=ratio_level)
        require_choice(losses.AGGREGATIONS, aggregation=aggregation)
        require_choice(losses.ADVANTAGE_SCALES, advantage_scale=advantage_scale)
        require_choice(DYNAMIC_SAMPLING, dynamic_sampling=dynamic_sampling)
        require_at_least(1, epochs=epochs, minibatches=minibatches, max_batches=max_batches)
        require_at_least(0, refresh_reference=refresh_reference)
        require_above(0.0, clip_range=clip_range, clip_range_high=clip_range_high, target_kl=target_kl)
        require_above(0.0, kl_per_update=kl_per_update)
        require_above(1.0, dual_clip=dual_clip)
        if not entropy_coef >= 0:
            raise ValueError(f"entropy_coef must be at least 0, got {entropy_coef}")
        self.clip_range, self.clip_range_high, self.dual_clip = clip_range, clip_range_high, dual_clip
        self.entropy_coef, self.ratio_level, self.aggregation = entropy_coef, ratio_level, aggregation
        self.advantage_scale, self.advantage_eps = advantage_scale, advantage_eps
        self.dynamic_sampling, self.max_batches = dynamic_sampling, max_batches
        self.epochs, self.minibatches = epochs, minibatches
        self.target_kl, self.kl_per_update, self.refresh_reference = target_kl, kl_per_update, refresh_reference
        self.outermost: Hooks = self
        super().__init__(policy, env, **common)

    @property
    def wrappers(self) -> list[Any]:
        found: list[Any] = []
        agent: Any = self.outermost
        while agent is not self:
            found.insert(0, agent)
            agent = agent.agent
        return found

    # 1. Sampling -----------------------------------------------------------------------------------------------------

    def iterate(self) -> None:
        self.learn_from(self.sample(), range(len(self.policy.schedule)))

    def sample(self) -> Rollout:
        """Images of new prompts, scored. With ``dynamic_sampling``, groups whose rewards are all equal are left out."""
        if self.dynamic_sampling == "keep":
            return super().sample()
        return sample_useful(self, super().sample, self.max_batches if self.dynamic_sampling == "resample" else 1)

    def while_scored(self, rollout: Rollout) -> Rollout:
        return self.fill(rollout, range(len(self.policy.schedule)))

    def fill(self, rollout: Rollout, steps: range) -> Rollout:
        """The rollout with the log-probabilities that its update of ``steps`` needs; they do not depend on scores.

        ``ref_logp`` is for an estimated KL. ``old_logp`` is for a KL in the reward, for that of the update and for
        several optimiser steps, ``old_soft`` for the latter with soft codes.
        """
        rollout.require_current(self.policy, steps)
        found: dict[str, Any] = {}
        estimated = bool(self.kl_coef) and self.kl != "full"
        if estimated and rollout.ref_logp is None and self.reference is not None:
            found["ref_logp"] = self.all_log_probs(self.reference, rollout, steps)
        if self.soft_codes is not None and not self.one_step and rollout.old_soft is None:
            found["old_logp"], found["old_soft"] = self.old_soft_log_probs(rollout, steps)
        before = not self.one_step or self.kl_per_update is not None or (estimated and self.kl_in == "reward")
        if before and rollout.old_logp is None and "old_logp" not in found:
            found["old_logp"] = self.old_log_probs(rollout, steps)
        return replace(rollout, **found, version=weights_version(self.policy)) if found else rollout

    # 2 to 4. From rewards to tokens ----------------------------------------------------------------------------------

    def learn_from(self, rollout: Rollout, steps: range) -> None:
        """Judge a rollout and update the grids in ``steps`` from it, wrappers included."""
        with self.timed("judge"):
            rollout = self.judge(rollout, steps)
            advantages = self.outermost.token_advantages(rollout, steps)
        self.update(rollout, advantages, steps)

    def judge(self, rollout: Rollout, steps: range) -> Rollout:
        """The rollout with its ``scores`` as the agent sees them, and with its ``advantages``."""
        if self.kl_in == "reward":  # the scores ask for it
            rollout = self.fill(rollout, steps)
        rollout = replace(rollout, scores=self.outermost.scores(rollout, steps))
        return replace(rollout, advantages=self.advantages(rollout, steps).to(self.device))

    def scores(self, rollout: Rollout, steps: range) -> Tensor:
        """Hook for wrappers: what each row is worth, ``(P, G)``. Here its reward, minus the KL if ``kl_in`` says so."""
        if not self.kl_coef or self.kl_in == "loss":
            return rollout.scores
        with torch.no_grad():
            kl = self.in_micro_batches(lambda rows: self.kl_to_reference(rollout, rows, steps).sum(1), rollout)  # (B,)
        self.logger.record("rollout/kl", kl.mean().item())
        return rollout.scores - self.kl_coef * kl.view_as(rollout.scores).to(rollout.scores)

    def advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """How much better than expected each row is, ``(B,)``. An algorithm may give it for each token, ``(B, n)``."""
        scores = self.processes.gather(rollout.scores)  # "batch" looks at all of them
        advantages = losses.group_advantages(scores, self.advantage_eps, scale=self.advantage_scale)
        return self.processes.mine(advantages, len(rollout.scores)).flatten()

    def token_advantages(self, rollout: Rollout, steps: range) -> Tensor:
        """Hook for wrappers: the advantage of each token of ``steps``, ``(B, n)``."""
        assert rollout.advantages is not None, "judge() it first"
        n = sum(self.policy.schedule.sizes[t] for t in steps)
        return rollout.advantages if rollout.advantages.ndim == 2 else rollout.advantages[:, None].expand(-1, n)

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        """Hook for wrappers: how much each token of ``steps`` counts in the loss.

        Here all tokens count the same, and the weights of a row sum to one. A wrapper multiplies these weights, by
        weights with a mean of one or by a mask. ``aggregation`` then decides what the loss is a mean of.
        """
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        uniform = losses.uniform_weights(len(rollout.scenes), sizes, self.device)
        return TokenWeights(uniform, uniform, uniform)

    def aggregate(self, weights: TokenWeights, steps: range) -> TokenWeights:
        """Weights for the rows of one optimiser step: its loss is the sum over tokens of weight times value."""
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        return TokenWeights(*(losses.AGGREGATIONS[self.aggregation](part, sizes) for part in weights))

    # 5. The update ---------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, advantages: Tensor, steps: range) -> None:
        """Learn from a rollout and its advantages, ``(B,)`` or ``(B, n)``. Gradients reach the grids in ``steps`` only.

        Earlier grids are input, and later grids are not computed. So the rollout needs the grids up to ``steps.stop``.
        """
        with self.updating():
            rollout = self.fill(rollout, steps)
            seen, norms = self.descend(rollout, advantages.to(self.device), steps)
            if self.kl_per_update is not None and norms:
                self.adapt_learning_rate(rollout, steps)
        if self.refresh_reference and self.n_updates % self.refresh_reference == 0 and self.reference is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.reference.parameters()), list(self.policy.parameters()))
        if norms:  # or all steps were skipped
            logs.record_update(
                self.logger,
                seen,
                optimizer_steps=len(norms),
                steps=steps,
                schedule=self.policy.schedule,
                clip=(self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high),
                processes=self.processes,
            )
            self.logger.record("train/grad_norm", sum(norms) / len(norms))
        self.logger.record("train/optimizer_steps", len(norms))

    def descend(self, rollout: Rollout, advantages: Tensor, steps: range) -> tuple[list[logs.Tokens], list[float]]:
        """Take the optimiser steps of an update. Returns what they saw at their tokens, and their gradient norms."""
        gather = self.processes.gather
        weights = TokenWeights(*map(gather, self.outermost.token_weights(rollout, steps)))  # of the global rows
        seen: list[logs.Tokens] = []
        norms: list[float] = []
        for minibatch in self.minibatch_rows(len(weights.policy), shuffle=not self.one_step):  # global rows
            shares = self.aggregate(weights.rows(minibatch), steps)
            self.optimizer.zero_grad()
            places, rows = self.own_rows(minibatch, advantages)
            loss, tokens = self.backward(rollout, rows, advantages, shares.rows(places), steps)
            if self.target_kl is not None and norms and logs.approx_kl(tokens, self.processes) > 1.5 * self.target_kl:
                self.optimizer.zero_grad()
                break
            norm = self.optimizer_step(loss)
            if math.isfinite(norm):
                norms.append(norm)
                seen += tokens
        return seen, norms

    def adapt_learning_rate(self, rollout: Rollout, steps: range) -> None:
        """Set ``lr_factor`` from the KL of the update that a filled rollout was learned in, see ``kl_step.py``."""
        assert rollout.old_logp is not None and self.kl_per_update is not None
        new = self.all_log_probs(self.policy, rollout, steps)  # (B, n)
        kl = losses.kl_estimate(rollout.old_logp, new, "k3")  # (B, n), the tokens being the old policy's
        mean = self.processes.mean(kl.double().sum().item(), kl.numel())
        self.lr_factor = next_factor(self.lr_factor, mean, self.kl_per_update)
        self.logger.record("train/update_kl", mean)

    def own_rows(self, minibatch: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """This process's share of a minibatch of global rows: the places in it and the rows, int64 ``(b,)`` each.

        ``advantages`` are those of all B rows. Rows with nothing to learn are left out, see `places_to_learn`.
        """
        before = self.processes.rows_before(len(advantages))
        places = ((minibatch >= before) & (minibatch < before + len(advantages))).nonzero().flatten()
        rows = minibatch[places] - before
        learning = self.places_to_learn(advantages[rows])
        return places[learning], rows[learning]

    def backward(
        self, rollout: Rollout, rows: Tensor, advantages: Tensor, weights: TokenWeights, steps: range
    ) -> tuple[Tensor, list[logs.Tokens]]:
        """Add the gradients of ``rows`` in an optimiser step's loss, one micro-batch after the other.

        ``weights`` belong to ``rows``, ``advantages`` to all B rows. Returns the loss and what was seen, detached.
        """
        assert self.one_step or rollout.old_logp is not None, "fill() it first"
        compared = rollout.old_logp if rollout.old_soft is None else rollout.old_soft  # (B, n)
        total, seen = torch.zeros((), device=self.device), []
        for piece in self.pieces(len(rows)):
            micro = rows[piece]
            old = None if self.one_step or compared is None else compared[micro]  # (b, n)
            loss, tokens = self.loss(rollout, micro, advantages[micro], weights.rows(piece), old, steps)
            self.processes.scaled(loss).backward()
            total += loss.detach()
            seen.append(tokens)
        return total, seen

    @property
    def one_step(self) -> bool:
        """Whether an update is one optimiser step. Then the policy in its loss is the policy that sampled."""
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
        """What some rows contribute to the loss of an optimiser step, and what was seen at their tokens.

        Args:
            rows: int64, which rows of the rollout; ``b`` of them.
            advantages: theirs, ``(b,)`` or ``(b, n)``.
            weights: theirs, aggregated, ``(b, n)`` each.
            old: what the ratio compares with, their log-probabilities under the policy that sampled, ``(b, n)``; with
                soft codes, of the tokens' neighbourhoods. ``None`` when it is this policy.
        """
        new = self.log_probs(self.policy, rollout, rows, steps)  # (b, n)
        if old is None:
            plain, old = new.logp.detach(), new.compared.detach()
        else:
            plain = old if rollout.old_soft is None or rollout.old_logp is None else rollout.old_logp[rows]
        policy_loss, ratio = self.policy_loss(new.compared, old, advantages, steps)  # (b, n)
        kl_weight = weights.kl * (self.kl_coef if self.kl_in == "loss" else 0.0)
        entropy_weight = weights.entropy * self.entropy_coef
        kl = torch.zeros_like(policy_loss)
        if self.kl_coef and self.kl_in == "loss":
            kl = self.kl_to_reference(rollout, rows, steps, new)
        loss = (weights.policy * policy_loss).sum() + (kl_weight * kl).sum()
        if self.entropy_coef:  # a weight of zero would still cost its backward pass
            loss = loss - (entropy_weight * new.entropy).sum()
        behaviour = torch.cat([rollout.draws[t].logp[rows] for t in steps], 1).sum(-1)  # (b, n)
        seen = logs.Tokens(
            policy_loss=policy_loss,
            kl=kl,
            entropy=new.entropy,
            policy_weight=weights.policy,
            kl_weight=kl_weight,
            entropy_weight=entropy_weight,
            ratio=ratio,
            behaviour_gap=behaviour - plain,
        )
        return loss, logs.Tokens(*(part.detach() for part in seen))

    def policy_loss(self, logp: Tensor, old: Tensor, advantages: Tensor, steps: range) -> tuple[Tensor, Tensor]:
        """The policy term at each token and the ratio in it, ``(b, n)`` both."""
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        ratio = losses.policy_ratio(logp, old, self.ratio_level, sizes)
        return losses.clipped_loss(ratio, advantages, self.clip_range, self.clip_range_high, self.dual_clip), ratio

    def minibatch_rows(self, rows: int, shuffle: bool) -> Iterator[Tensor]:
        """The global rows of each optimiser step of an update, epoch after epoch."""
        for _ in range(self.epochs):
            order = torch.arange(rows, device=self.device)
            if shuffle:
                order = torch.randperm(rows, generator=self.generator, device=self.device)
            yield from order.chunk(self.minibatches)

    def places_to_learn(self, advantages: Tensor) -> Tensor:
        """The places of a minibatch that have a gradient, int64. With neither KL nor entropy in the loss, rows of zero
        advantage have none and are left out. One row always stays, because the backward pass needs one."""
        everything = torch.arange(len(advantages), device=self.device)
        if (self.kl_coef and self.kl_in == "loss") or self.entropy_coef:
            return everything
        kept = everything[(advantages != 0).flatten(1).any(1) if advantages.ndim == 2 else advantages != 0]
        return kept if len(kept) else everything[:1]
