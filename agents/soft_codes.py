"""Soft codes: the log-probability of a token is that of its neighbourhood in the codebook, for `soft_codes`.

Codes that look alike share what they earn. In place of ``log p(c)`` the ratio compares ::

    log s(c) = log sum_c' K(c, c') p(c'),    K(c, c') = exp(-|e_c - e_c'|^2 / (width d)),

with d the median over codes of the squared distance to the nearest other one. The gradient of ``log s(c)`` is the mean
of that of ``log p(c')`` under ``K(c, c') p(c') / s(c)``: which of several codes that look alike was drawn makes no
noise. A token of D codes has the product of their kernels, and ``log s`` is the sum over its codes.

**When it is exact.** Let K be 1 within neighbourhoods that share no code and 0 between them, and let neither the
reward nor the policy's later grids tell the codes of a neighbourhood apart. Then the expected gradient is the policy
gradient, and its variance is that without the choice inside a neighbourhood (Rao and Blackwell). **When it is not**:
in general it is the gradient for the smoothed advantage ``sum_c p(c) K(c, c') A(c) / s(c)`` of each code c'. So it
cannot tell neighbours apart that the reward does; and since these weights do not sum to 1, an advantage that is the
same for all codes draws a little towards crowded neighbourhoods or away from them, which is why advantages have to be
centred. docs/theory.md has the derivation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_kernel(distances: Tensor, width: float) -> Tensor:
    """``log K`` for all pairs of the V values of a code, ``(V, V)``, 0 on the diagonal.

    Args:
        distances: squared, ``(V, V)``, as ``VisualTokenizer.code_distances`` gives them.
        width: above 0, in units of the median squared distance to the nearest other value.

    Raises:
        ValueError: more than half of the codes have a twin, so that there is no unit of distance.
    """
    unit = distances.clone().fill_diagonal_(torch.inf).amin(1).median()
    if not unit > 0:
        raise ValueError(
            "more than half of the tokenizer's codes have a twin at distance 0: leave out soft_codes, or train a "
            "tokenizer that uses its codebook"
        )
    return -distances / (width * unit)


def neighbourhood_logp(logp: Tensor, chosen: Tensor, kernel: Tensor) -> Tensor:
    """``log s`` of the chosen tokens, ``(B, n)``, from all log-probabilities.

    Args:
        logp: ``(B, n, D, V)``.
        chosen: the tokens, int64 ``(B, n, D)``.
        kernel: `log_kernel`'s, ``(V, V)``.
    """
    return (logp + kernel[chosen]).logsumexp(-1).sum(-1)


def draw_neighbours(grid: Tensor, kernel: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each code of a grid replaced by one drawn with a probability in proportion to K, itself included.

    Args:
        grid: int64 ``(B, n, D)``.
        kernel: `log_kernel`'s, ``(V, V)``.
        generator: of the draws, on the grid's device.
    """
    drawn = torch.multinomial(kernel.softmax(-1)[grid.flatten()], 1, generator=generator)  # (B * n * D, 1)
    return drawn.view_as(grid)
