"""GRPO, the paper's baseline: one advantage a picture, for all of its tokens (DeepSeekMath, arXiv 2402.03300).

An iteration, in this file's order:

1. sample G pictures for each of P prompts and score them;
2. advantage: the score, normalised within the prompt's group;
3. update: clipped policy gradient on every token, held near a frozen reference by a KL penalty.

Old, new and reference log-probabilities come from one function, teacher-forced, conditional and untruncated, never
from the sampler, whose distribution is another one under guidance or truncation.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from agents import logs, losses
from agents.base import Agent, require_at_least
from agents.policies.base import Policy
from agents.rollout import Rollout

if TYPE_CHECKING:
    from agents.wrapper import Wrapper


class TokenWeights(NamedTuple):
    """How much each token counts in the two terms of an update, each ``(B, n)``, n the tokens of its steps."""

    policy: Tensor
    kl: Tensor


class GRPO(Agent):
    """Group relative policy optimisation.

    Args:
        policy, env: and more keywords, as in `Agent`.
        clip_range: the ratio may move the loss within ``1 +- clip_range``.
        kl_coef: weight of the KL to the reference, the policy as it was given; 0 is without.
        kl: "k1", "k2", "k3" or "full", see ``losses.kl_estimate``.
        ratio_level: "token", "grid" or "sequence", see ``losses.policy_ratio``.
        advantage_eps: added to a group's standard deviation.
        support: "model" learns with the model's own log-probabilities; "sampler" renormalises them on the codes that a
            truncated sampler could draw, frozen at sampling. Pushing down truncated samples otherwise leaks
            probability to codes that are never shown, so truncated training needs this or a strong KL.
        epochs: passes over a rollout.
        minibatches: optimiser steps an epoch.
        micro_batch: rows in one forward and backward, to fit the memory; leaves the update unchanged.
        max_grad_norm: the gradient is scaled down to this norm.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        *,
        clip_range: float = 0.2,
        kl_coef: float = 0.02,
        kl: str = "k3",
        ratio_level: str = "token",
        advantage_eps: float = 1e-4,
        support: str = "model",
        epochs: int = 1,
        minibatches: int = 1,
        micro_batch: int | None = None,
        max_grad_norm: float = 1.0,
        **common: Any,
    ) -> None:
        for name, value, choices in (
            ("kl", kl, losses.KL_KINDS),
            ("ratio_level", ratio_level, losses.RATIO_LEVELS),
            ("support", support, ("model", "sampler")),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
        require_at_least(1, epochs=epochs, minibatches=minibatches, micro_batch=micro_batch or 1)
        if not kl_coef >= 0 or not clip_range > 0 or not max_grad_norm > 0:
            raise ValueError(
                "kl_coef must be at least 0, clip_range and max_grad_norm above 0; "
                f"got {kl_coef}, {clip_range} and {max_grad_norm}"
            )
        self.clip_range, self.kl_coef, self.kl, self.ratio_level = clip_range, kl_coef, kl, ratio_level
        self.advantage_eps, self.support = advantage_eps, support
        self.epochs, self.minibatches, self.micro_batch = epochs, minibatches, micro_batch
        self.max_grad_norm = max_grad_norm
        self.outermost: GRPO | Wrapper = self
        super().__init__(policy, env, **common)

    @property
    def unwrapped(self) -> GRPO:
        """This agent; of a wrapper, the agent inside."""
        return self

    @property
    def wrappers(self) -> list[Wrapper]:
        found, agent = [], self.outermost
        while not isinstance(agent, GRPO):
            found.append(agent)
            agent = agent.agent
        return found[::-1]

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.kl_coef:
            tokenizer = self.policy.tokenizer  # shared, not copied
            self.reference = copy.deepcopy(self.policy, {id(tokenizer): tokenizer}).requires_grad_(False)

    @property
    def keeps_support(self) -> bool:
        return self.support == "sampler"

    def iterate(self) -> None:
        rollout = self.sample()
        advantages = losses.group_advantages(rollout.scores, self.advantage_eps)  # (P, G)
        self.update(rollout, advantages.flatten(), range(len(self.policy.schedule)))

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        """The hook of the wrappers: the weights of the tokens of ``steps`` in an update from this rollout.

        Here the token mean, rows that sum to one; a loss is the weighted sum over a row's tokens, averaged over rows.
        A wrapper multiplies what this returns: by weights with a mean of one to shift attention, by a mask to gate.
        """
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        uniform = losses.uniform_weights(len(rollout.scenes), sizes, self.device)
        return TokenWeights(uniform, uniform)

    def update(self, rollout: Rollout, advantages: Tensor, steps: range) -> None:
        """Learn from a rollout, one advantage a row; gradients reach the grids in ``steps`` and no other.

        Nothing after ``steps`` is computed and nothing before it is predicted, so a rollout need only hold the grids up
        to ``steps.stop``.
        """
        start = time.perf_counter()
        self._update_learning_rate(self.optimizer)
        rows, advantages = len(advantages), advantages.to(self.device)
        weights = self.outermost.token_weights(rollout, steps)
        one_step = self.epochs == self.minibatches == 1  # the policy of the loss is then the one that sampled
        old = None if one_step else self.old_log_probs(rollout, rows, steps)  # (B, n)
        seen: list[logs.Tokens] = []
        norms = []
        for _ in range(self.epochs):
            order = torch.arange(rows, device=self.device)
            if not one_step:
                order = torch.randperm(rows, generator=self.generator, device=self.device)
            for minibatch in order.chunk(self.minibatches):
                self.optimizer.zero_grad()
                for micro in self.rows_to_learn(minibatch, advantages).split(self.micro_batch or rows):
                    loss, tokens = self.loss(rollout, micro, advantages[micro], weights, old, steps, len(minibatch))
                    self.require_finite("loss", loss)
                    loss.backward()
                    seen.append(tokens)
                norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.require_finite("gradient norm", norm)
                norms.append(norm.item())
                self.optimizer.step()
        self._n_updates += 1
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        logs.record_update(
            self.logger, seen, rows * self.epochs, steps, self.policy.schedule, self.clip_range, self.kl_coef > 0
        )
        self.logger.record("train/grad_norm", sum(norms) / len(norms))
        self.logger.record("train/n_updates", self.n_updates)
        self.logger.record("time/update", elapsed)

    def loss(
        self,
        rollout: Rollout,
        rows: Tensor,
        advantages: Tensor,
        weights: TokenWeights,
        old: Tensor | None,
        steps: range,
        batch: int,
    ) -> tuple[Tensor, logs.Tokens]:
        """The share of some rows in the loss of a minibatch of ``batch`` rows, and what was seen at their tokens."""
        sizes = [self.policy.schedule.sizes[t] for t in steps]
        logp, entropy, full = self.log_probs(self.policy, rollout, rows, steps)  # (B, n)
        old_logp = logp.detach() if old is None else old[rows]
        ratio = losses.policy_ratio(logp, old_logp, self.ratio_level, sizes)
        policy_loss = losses.clipped_loss(ratio, advantages, self.clip_range)  # (B, n)
        policy_weight, kl_weight = weights.policy[rows], weights.kl[rows] * self.kl_coef
        kl = torch.zeros_like(policy_loss)
        if self.reference is not None:
            with torch.no_grad():
                ref_logp, _, ref_full = self.log_probs(self.reference, rollout, rows, steps)
            if full is not None and ref_full is not None and self.kl == "full":
                kl = losses.full_kl(full, ref_full)
            else:
                kl = losses.kl_estimate(logp, ref_logp, self.kl)
        loss = losses.aggregate(policy_loss, policy_weight, batch) + losses.aggregate(kl, kl_weight, batch)
        behaviour = torch.cat([rollout.behaviour_logp[t][rows] for t in steps], 1).sum(-1)  # (B, n)
        seen = (policy_loss, kl, policy_weight, kl_weight, ratio, entropy, behaviour - old_logp)
        return loss, logs.Tokens(*(part.detach() for part in seen))

    def log_probs(
        self, policy: Policy, rollout: Rollout, rows: Tensor, steps: range
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability and entropy of the tokens of ``steps``, ``(B, n)``, and where an option needs them all
        log-probabilities, ``(B, n, D, V)``. The one source of old, new and reference log-probabilities."""
        cond = policy.take(rollout.cond, rows)
        grids = [grid[rows] for grid in rollout.grids[: steps.stop]]
        if self.support == "model" and self.kl != "full":
            logp, entropy = policy.evaluate(cond, grids, steps)  # (B, n, D)
            return logp.sum(-1), entropy.sum(-1), None
        parts = [rollout.support[t] for t in steps] if self.support == "sampler" else [None]
        support = None if parts[0] is None else torch.cat([part[rows] for part in parts if part is not None], 1)
        chosen = torch.cat([grids[t] for t in steps], 1)  # (B, n, D)
        return losses.log_probs(policy(cond, grids, steps), chosen, support)

    @torch.no_grad()
    def old_log_probs(self, rollout: Rollout, rows: int, steps: range) -> Tensor:
        """Log-probabilities before the first optimiser step, ``(B, n)``, in micro-batches."""
        parts = torch.arange(rows, device=self.device).split(self.micro_batch or rows)
        return torch.cat([self.log_probs(self.policy, rollout, part, steps)[0] for part in parts])

    def rows_to_learn(self, rows: Tensor, advantages: Tensor) -> Tensor:
        """Without a KL term, rows of zero advantage have zero gradient and are left out; one stays, for its zeros."""
        if self.kl_coef:
            return rows
        kept = rows[advantages[rows] != 0]
        return kept if len(kept) else rows[:1]

    def require_finite(self, name: str, value: Tensor) -> None:
        """``RuntimeError`` before a step is taken with a number that would ruin the weights."""
        if not torch.isfinite(value):
            self.optimizer.zero_grad()
            raise RuntimeError(
                f"the {name} of update {self.n_updates + 1} is {value.item()}: the step was not applied and the "
                "weights are as before it; lower learning_rate, raise kl_coef, or load an earlier checkpoint"
            )
