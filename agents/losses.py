"""The losses, as pure functions of tensors.

Rows are samples and columns are tokens, ``(B, n)``, where ``n`` counts the tokens of the grids that an update touches.
A token's log-probability is the sum over its ``D`` codes. Nothing here knows of policies, environments or wrappers.

Where algorithms differ in one small function, the variants are registered by name; to add one::

    @losses.AGGREGATIONS.register("finest_only")
    def finest_only(weights, sizes):  # (B, n) to (B, n)
        ...

    GRPO("base", "VARText-v0", aggregation="finest_only")

Papers: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), GRPO (DeepSeekMath, arXiv 2402.03300), RLOO (arXiv
2402.14740), REINFORCE++ (arXiv 2501.03262), DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783), GSPO (arXiv
2507.18071), GMPO (arXiv 2507.20673), and Schulman's note on estimators, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from agents.common.registry import Registry

MAX_LOG_RATIO = 10.0  # exp(10) = 2e4: far outside any trust region, and still a finite gradient

# What the registered functions are, with their arguments.
ADVANTAGE_SCALES: Registry[Callable[[Tensor, Tensor, float, int], Tensor]] = Registry("advantage_scale")  # see below
RATIO_LEVELS: Registry[Callable[[Tensor, Sequence[int]], Tensor]] = Registry("ratio_level")  # log-ratio (B, n), sizes
AGGREGATIONS: Registry[Callable[[Tensor, Sequence[int]], Tensor]] = Registry("aggregation")  # weights (B, n), sizes
KL_ESTIMATES: Registry[Callable[[Tensor], Tensor]] = Registry("kl")  # log reference - log policy (B, n)


# Advantages ----------------------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4, ddof: int = 1, scale: str = "group") -> Tensor:
    """Rewards ``(P, G)`` to advantages ``(P, G)``: ``(r - mean) / (std + eps)`` over each prompt's group.

    GRPO's outcome supervision (DeepSeekMath, section 4.1.2). ``scale`` is a name in `ADVANTAGE_SCALES`, what to divide
    by; a standard deviation divides by its count minus ``ddof``. A group whose rewards are all equal gets exactly zero:
    decided by comparing them, since rounding in the mean, divided by a small ``eps``, would make noise look like a
    signal.
    """
    rewards = _checked(rewards)
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = ADVANTAGE_SCALES[scale](centred, rewards, eps, ddof)  # (P, G)
    return advantages.masked_fill(zero_variance(rewards)[:, None], 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards ``(P, G)`` to advantages ``(P, G)``: each minus the mean of its group's others (RLOO, section 3.2)."""
    rewards = _checked(rewards)
    others = rewards.shape[1] - 1
    if others == 0:
        raise ValueError("leave-one-out needs groups of at least 2 rewards, got 1")
    baseline = (rewards.sum(1, keepdim=True) - rewards) / others
    return (rewards - baseline).masked_fill(zero_variance(rewards)[:, None], 0.0)


def _checked(rewards: Tensor) -> Tensor:
    rewards = torch.as_tensor(rewards)
    if rewards.ndim != 2 or rewards.numel() == 0:
        raise ValueError(f"rewards must be (prompts, group size) and not empty, got shape {tuple(rewards.shape)}")
    return rewards if rewards.dtype == torch.float64 else rewards.float()


@ADVANTAGE_SCALES.register("group")
def group_scale(centred: Tensor, rewards: Tensor, eps: float, ddof: int) -> Tensor:
    """Rewards minus their group's mean, divided by the standard deviation of each group: GRPO."""
    return centred / (rewards.std(1, correction=ddof, keepdim=True) + eps)


@ADVANTAGE_SCALES.register("batch")
def batch_scale(centred: Tensor, rewards: Tensor, eps: float, ddof: int) -> Tensor:
    """Divided by one standard deviation, of the batch around its groups' means: REINFORCE++ with a group baseline.

    A group of nearly equal rewards then stays small, where `group_scale` blows it up.
    """
    return centred / (centred.square().sum().div(max(centred.numel() - ddof, 1)).sqrt() + eps)


@ADVANTAGE_SCALES.register("none")
def no_scale(centred: Tensor, rewards: Tensor, eps: float, ddof: int) -> Tensor:
    """Rewards minus the group's mean: Dr. GRPO, section 3.1."""
    return centred


def zero_variance(rewards: Tensor) -> Tensor:
    """Which groups hold one value only, ``(P, G)`` to bool ``(P,)``."""
    return (rewards == rewards[:, :1]).all(1)


# Log-probabilities and ratios -----------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    """What a policy says of given tokens, in nats; everything but the tokens' own where it was asked for."""

    logp: Tensor  # (B, n), summed over D
    entropy: Tensor  # (B, n), summed over D
    everything: Tensor | None = None  # (B, n, D, V)
    soft: Tensor | None = None  # (B, n), of the tokens' neighbourhoods, see ``agents/soft_codes.py``

    @property
    def compared(self) -> Tensor:
        """What a ratio compares, ``(B, n)``: the log-probabilities of the neighbourhoods if there are any."""
        return self.logp if self.soft is None else self.soft


def log_probs(logits: Tensor, tokens: Tensor, support: Tensor | None = None) -> Predicted:
    """Log-probability of the tokens, entropy, and all log-probabilities, in fp32.

    Args:
        logits: ``(B, n, D, V)``.
        tokens: ``(B, n, D)`` int64.
        support: bool ``(B, n, D, V)``, the tokens that the sampler could draw; the distribution is renormalised on it,
            so that pushing samples down does not leak probability to tokens that are never shown. Every token must
            lie in it. ``None`` leaves the model's own.
    """
    logits = logits.float()
    if support is not None:
        logits = logits.masked_fill(~support, -1e9)  # finite, so that 0 * log 0 is 0
    everything = logits.log_softmax(-1)
    chosen = everything.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, n, D)
    entropy = -(everything.exp() * everything).sum(-1)
    return Predicted(chosen.sum(-1), entropy.sum(-1), everything)


def policy_ratio(logp: Tensor, old_logp: Tensor, level: str = "token", sizes: Sequence[int] | None = None) -> Tensor:
    """Importance ratios ``(B, n)``, new policy over old, at a level named in `RATIO_LEVELS`.

    ``sizes`` are the tokens of each grid, summing to n; default: one grid.
    """
    sizes = (logp.shape[1],) if sizes is None else sizes
    if sum(sizes) != logp.shape[1]:
        raise ValueError(f"the sizes of the grids must sum to {logp.shape[1]} tokens, got {tuple(sizes)}")
    log_ratio = RATIO_LEVELS[level](logp - old_logp, sizes)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@RATIO_LEVELS.register("token")
def token_level(log_ratio: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each token's own (PPO eq. 6). The default: the product over a grid of 64 tokens always clips.

    A token of D codes is one decision, drawn from one distribution, and its ratio is the product of theirs: weights,
    masks and advantages are of tokens too. The more codes, the wider it spreads. After the same few steps the log-ratio
    of 16 bits had twice the standard deviation of one of 512 codes, so several epochs want a wider ``clip_range``.
    """
    return log_ratio


@RATIO_LEVELS.register("grid")
def grid_level(log_ratio: Tensor, sizes: Sequence[int]) -> Tensor:
    """The geometric mean over the token's grid (GMPO's mean, over a grid in place of the sequence)."""
    means = [part.mean(1, keepdim=True).expand_as(part) for part in log_ratio.split(list(sizes), 1)]
    return torch.cat(means, 1)


@RATIO_LEVELS.register("sequence")
def sequence_level(log_ratio: Tensor, sizes: Sequence[int]) -> Tensor:
    """The geometric mean over all n tokens (GSPO eq. 7)."""
    return log_ratio.mean(1, keepdim=True).expand_as(log_ratio)


def clipped_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """The clipped surrogate, negated, for each token (PPO eq. 7): ``(B, n)``.

    Args:
        advantages: ``(B,)``, one a sample, or ``(B, n)``.
        clip_range: the ratio is cut to ``1 - clip_range .. 1 + clip_range`` ...
        clip_range_high: ... or to ``1 + clip_range_high`` above: DAPO's clip-higher, section 3.1, which lets unlikely
            codes grow.
        dual_clip: c, above 1. With a negative advantage A the term is held above ``c A``, so that a ratio far above 1
            cannot make it as large as it likes (dual-clip PPO, eq. 5).
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    term = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        term = torch.where(advantages < 0, torch.maximum(term, dual_clip * advantages), term)
    return -term


def likelihood_loss(logp: Tensor, advantages: Tensor) -> Tensor:
    """``-A log p`` for each token, ``(B, n)``, from advantages ``(B,)`` or ``(B, n)``.

    The policy gradient when the policy is the one that sampled (REINFORCE), and imitation where ``A`` is 1.
    """
    return -(advantages[:, None] if advantages.ndim == 1 else advantages) * logp


# The KL to the reference ---------------------------------------------------------------------------------------------


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k3", clamp: float = MAX_LOG_RATIO) -> Tensor:
    """KL(policy, reference) at each token from one sample of it, ``(B, n)``, by a name in `KL_ESTIMATES`.

    The log-ratio is clamped first. Without sampling noise: `full_kl`.
    """
    return KL_ESTIMATES[kind]((ref_logp - logp).clamp(-clamp, clamp))


@KL_ESTIMATES.register("k1")
def k1(r: Tensor) -> Tensor:
    """``-r``: unbiased, but as a loss its gradient is zero in expectation. The one to put into a reward."""
    return -r


@KL_ESTIMATES.register("k2")
def k2(r: Tensor) -> Tensor:
    """``r^2 / 2``: biased, with the gradient of the true KL."""
    return r.square() / 2


@KL_ESTIMATES.register("k3")
def k3(r: Tensor) -> Tensor:
    """``exp(r) - r - 1``: unbiased and never negative (GRPO eq. 4)."""
    return r.exp() - r - 1


def full_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy, reference) at each token, summed over the vocabulary: ``(B, n, D, V)`` twice to ``(B, n)``."""
    return (logp.exp() * (logp - ref_logp)).sum((-1, -2))


# From tokens to a loss -----------------------------------------------------------------------------------------------


class TokenWeights(NamedTuple):
    """How much each token counts in the terms of an update, each ``(B, n)``, n the tokens of its steps."""

    policy: Tensor
    kl: Tensor
    entropy: Tensor  # of the entropy bonus

    def rows(self, index: Tensor | slice) -> TokenWeights:
        """Those of some rows."""
        return TokenWeights(*(part[index] for part in self))


def uniform_weights(rows: int, sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Every one of a row's n tokens counts ``1 / n``, ``(B, n)``."""
    n = sum(sizes)
    return torch.full((rows, n), 1 / n, device=device)


# What a loss averages over. `weights` say how much each token of an optimiser step counts against the others, and come
# back divided so that the loss is the plain sum of weight times value. They are divided once for the whole step, so its
# micro-batches' losses add up to the same however it is cut. All rows have the same tokens here, and so the first three
# agree, until something such as a mask takes tokens away.


@AGGREGATIONS.register("constant")
def constant(weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean over rows of each row's weighted sum: a row of which little is kept counts little (Dr. GRPO).

    The length that Dr. GRPO divides by is n here, through `uniform_weights`.
    """
    return weights / len(weights)


@AGGREGATIONS.register("token_mean")
def token_mean(weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """All kept tokens of all rows count the same (DAPO, section 3.3)."""
    return _divide(weights, weights.sum())


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """All rows count the same, whatever is kept of them (GRPO eq. 3, its 1 / |o_i|)."""
    return _divide(weights, weights.sum(1, keepdim=True)) / len(weights)


@AGGREGATIONS.register("step_mean")
def step_mean(weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """All grids of all rows count the same. This is PANW with alpha = 1, and PANW on top of it does nothing."""
    parts = weights.split(list(sizes), 1)
    means = torch.cat([_divide(part, part.sum(1, keepdim=True)) for part in parts], 1)
    return means / (len(sizes) * len(weights))


def _divide(weights: Tensor, total: Tensor) -> Tensor:
    """Zero where there is nothing to divide."""
    return weights / total.masked_fill(total == 0, 1.0)


def per_grid(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums over each grid's tokens: ``(B, n)`` to ``(B, number of grids)``."""
    return torch.stack([part.sum(1) for part in values.split(list(sizes), 1)], 1)
