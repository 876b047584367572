"""The losses, as pure functions of tensors.

Rows are samples and columns are tokens, ``(B, n)``, where ``n`` counts the tokens of the grids that an update touches.
A token's log-probability is the sum over its ``D`` codes. Nothing here knows of policies, environments or wrappers.

Papers: PPO (arXiv 1707.06347), GRPO (DeepSeekMath, arXiv 2402.03300), GSPO (arXiv 2507.18071), GMPO
(arXiv 2507.20673), and Schulman's note on estimators, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RATIO_LEVELS = ("token", "grid", "sequence")
KL_KINDS = ("k1", "k2", "k3", "full")
MAX_LOG_RATIO = 10.0  # exp(10) = 2e4: far outside any trust region, and still a finite gradient


def group_advantages(rewards: Tensor, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """Rewards ``(P, G)`` to advantages ``(P, G)``: ``(r - mean) / (std + eps)`` over each prompt's group.

    GRPO's outcome supervision (DeepSeekMath, section 4.1.2). The standard deviation divides by ``G - ddof``. A group
    whose rewards are all equal gets exactly zero: decided by comparing them, since rounding in the mean, divided by
    a small ``eps``, would make noise look like a signal.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.ndim != 2 or rewards.numel() == 0:
        raise ValueError(f"rewards must be (prompts, group size) and not empty, got shape {tuple(rewards.shape)}")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / (rewards.std(1, correction=ddof, keepdim=True) + eps)  # (P, G)
    return advantages.masked_fill(zero_variance(rewards)[:, None], 0.0)


def zero_variance(rewards: Tensor) -> Tensor:
    """Which groups hold one value only, ``(P, G)`` to bool ``(P,)``."""
    return (rewards == rewards[:, :1]).all(1)


def log_probs(logits: Tensor, tokens: Tensor, support: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the tokens, entropy, and all log-probabilities, in fp32.

    Args:
        logits: ``(B, n, D, V)``.
        tokens: ``(B, n, D)`` int64.
        support: bool ``(B, n, D, V)``, the codes that the sampler could draw; the distribution is renormalised on it,
            so that pushing samples down does not leak probability to codes that are never shown. Every token must
            lie in it. ``None`` leaves the model's own.

    Returns:
        ``(B, n)`` and ``(B, n)``, both summed over D, and ``(B, n, D, V)``.
    """
    logits = logits.float()
    if support is not None:
        logits = logits.masked_fill(~support, -1e9)  # finite, so that 0 * log 0 is 0
    everything = logits.log_softmax(-1)
    chosen = everything.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, n, D)
    entropy = -(everything.exp() * everything).sum(-1)
    return chosen.sum(-1), entropy.sum(-1), everything


def policy_ratio(logp: Tensor, old_logp: Tensor, level: str = "token", sizes: Sequence[int] | None = None) -> Tensor:
    """Importance ratios ``(B, n)``, new policy over old, at one of three levels.

    - ``"token"``: each token's own (PPO eq. 6). The default: the product over a grid of 64 tokens always clips.
    - ``"grid"``: the geometric mean over the token's grid (GMPO's mean, over a grid in place of the sequence).
    - ``"sequence"``: the geometric mean over all n tokens (GSPO eq. 7).

    ``sizes`` are the tokens of each grid, summing to n; only ``"grid"`` needs them.
    """
    log_ratio = logp - old_logp
    if level == "grid":
        if sizes is None or sum(sizes) != logp.shape[1]:
            raise ValueError(f"level='grid' needs grid sizes that sum to {logp.shape[1]} tokens, got {sizes}")
        means = [part.mean(1, keepdim=True).expand_as(part) for part in log_ratio.split(list(sizes), 1)]
        log_ratio = torch.cat(means, 1)
    elif level == "sequence":
        log_ratio = log_ratio.mean(1, keepdim=True).expand_as(log_ratio)
    elif level != "token":
        raise ValueError(f"unknown ratio level {level!r}: choose one of {', '.join(RATIO_LEVELS)}")
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_loss(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped surrogate, negated, for each token (PPO eq. 7): ``(B, n)``.

    ``advantages`` are ``(B,)``, one a sample, or ``(B, n)``.
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k3", clamp: float = MAX_LOG_RATIO) -> Tensor:
    """KL(policy, reference) at each token from one sample of it, ``(B, n)``; the log-ratio is clamped first.

    With ``r = log ref - log policy`` (Schulman's note): ``k1 = -r`` (unbiased, but as a loss its gradient is zero in
    expectation), ``k2 = r^2 / 2`` (biased, the gradient of the true KL), ``k3 = exp(r) - r - 1`` (unbiased, never
    negative; GRPO eq. 4). Without sampling noise: `full_kl`.
    """
    r = (ref_logp - logp).clamp(-clamp, clamp)
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    if kind == "k3":
        return r.exp() - r - 1
    raise ValueError(f"unknown KL estimate {kind!r}: choose one of {', '.join(KL_KINDS)}")


def full_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(policy, reference) at each token, summed over the vocabulary: ``(B, n, D, V)`` twice to ``(B, n)``."""
    return (logp.exp() * (logp - ref_logp)).sum((-1, -2))


def uniform_weights(rows: int, sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The token mean: every one of a row's n tokens weighs ``1 / n``, ``(B, n)``."""
    n = sum(sizes)
    return torch.full((rows, n), 1 / n, device=device)


def aggregate(values: Tensor, weights: Tensor, rows: int) -> Tensor:
    """The weighted sum over tokens, averaged over ``rows`` samples: a scalar.

    ``rows`` counts the samples of the whole optimiser step and not of this micro-batch, so the micro-batches' losses
    add up to the loss of the batch however it is cut.
    """
    return (values * weights).sum() / rows


def per_grid(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums over each grid's tokens: ``(B, n)`` to ``(B, number of grids)``."""
    return torch.stack([part.sum(1) for part in values.split(list(sizes), 1)], 1)
