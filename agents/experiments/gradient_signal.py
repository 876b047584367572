"""How much of GRPO's gradient is signal: the cosine between the gradients of independent batches, and its error.

A gradient is a part that all batches share and noise of its own. The noise of two batches is as good as orthogonal in
millions of dimensions, so the mean cosine is the share of the squared length that is signal.

The N (N - 1) / 2 pairs are no independent observations, because each batch is in N - 1 of them. So the error is that of
the jackknife over batches: the mean is computed without each batch in turn. Where there is no signal at all it comes
out up to sqrt(2) times too large, and never too small on average.

The learned temperatures of a policy are left out. Those of a `VARTextPolicy` are six numbers, multiplied by a large
gain, and more than nine tenths of the gradient's length: with them the cosine tells whether batches agree on how
sharply to sample, and not whether they agree on what to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import trange

from agents import GRPO
from agents.experiments.gates import Gate
from agents.experiments.jackknife import jackknife_error
from agents.losses import group_advantages

COSINE_GATE = 0.05  # at least, between batches of 64 images
ERROR_GATE = 0.01  # at most


def batch_gradient(agent: GRPO) -> Tensor:
    """The policy gradient of one new batch, without KL and clipping, ``(parameters,)``."""
    rollout = agent.sample()
    advantages = group_advantages(rollout.scores).flatten().to(agent.device)  # (B,)
    logp, _ = agent.policy.evaluate(rollout.cond, rollout.grids, range(len(agent.policy.schedule)))  # (B, L, D)
    left_out = agent.policy.temperature_parameters
    parameters = [weight for name, weight in agent.policy.named_parameters() if name not in left_out]
    parts = torch.autograd.grad(-(advantages * logp.sum((1, 2))).mean(), parameters)
    return torch.cat([part.flatten() for part in parts])


def cosine_matrix(gradients: Sequence[Tensor]) -> NDArray[np.float64]:
    """The cosines between N gradients, each ``(parameters,)``: ``(N, N)``. A gradient of zero has the cosine 0."""
    unit = [torch.nn.functional.normalize(gradient, dim=0) for gradient in gradients]
    return np.array([[torch.dot(a, b).item() for a in unit] for b in unit])


def mean_cosine(cosines: NDArray[np.float64]) -> tuple[float, float]:
    """The mean over the pairs of N batches, and its standard error by the jackknife over batches.

    Args:
        cosines: ``(N, N)``, symmetric, N at least 3.
    """
    n = len(cosines)
    of_batch = cosines.sum(1) - np.diag(cosines)  # (N,) over the pairs that each is in
    total = of_batch.sum() / 2
    left_out = (total - of_batch) / math.comb(n - 1, 2)
    return float(total / math.comb(n, 2)), jackknife_error(left_out)


def signal(agent: GRPO, batches: int) -> tuple[float, float]:
    """`mean_cosine` of the gradients of so many new batches; nothing is learned."""
    gradients = [batch_gradient(agent) for _ in trange(batches, desc="batches", leave=False)]
    return mean_cosine(cosine_matrix(gradients))


def signal_gates(mean: float, error: float, batches: int, images: int) -> list[Gate]:
    """The gate of the signal and that of its error.

    The second one says how many batches to try: the error falls with the root of their number, or faster.
    """
    few = f"; {batches} are too few, try {math.ceil(batches * (error / ERROR_GATE) ** 2)}" if error > ERROR_GATE else ""
    return [
        Gate(f"mean cosine between the gradients of {batches} batches of {images} images", mean, low=COSINE_GATE),
        Gate(f"its standard error, by the jackknife over batches{few}", error, high=ERROR_GATE),
    ]
