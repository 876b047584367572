"""A tokenizer whose tokens are bits: binary spherical quantisation, BSQ (Zhao et al., 2024, arXiv 2406.07548).

A vector of D channels is rounded to the nearest corner of the cube on the unit sphere: bit b_d is the sign of channel
d, and the code vector is ``(2 b - 1) / sqrt(D)``. There is no codebook to learn or to search, and a token has 2^D
values without a table of them; a policy predicts its D bits side by side. Over scales of residuals this is the
tokenizer of Infinity (Han et al., 2024, arXiv 2412.04431), here with the small networks of ``residual.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.residual import DEFAULT_SCHEDULE, MultiScaleTokenizer


class BitTokenizer(MultiScaleTokenizer):
    """Images to grids of D bits a token and back: ``V`` is 2, grids are int64 ``(B, n_t, D)``.

    Args:
        schedule: the grids; the last one times ``schedule.patch`` is the image size in pixels.
        bits: D, which is also the number of channels of the canvas.
        width: channels of the convolutional encoder and decoder.
        blocks: residual blocks in each of them.
        world: the name of the rendered world that it is for, other than the small one.

    Raises:
        ValueError: less than one bit.
    """

    vocab_size = 2

    def __init__(
        self,
        schedule: ScaleSchedule = DEFAULT_SCHEDULE,
        bits: int = 16,
        width: int = 128,
        blocks: int = 2,
        world: str | None = None,
    ) -> None:
        if bits < 1:
            raise ValueError(f"bits must be at least 1, got {bits}")
        super().__init__(schedule, bits, width, blocks, world)
        self.depth = bits
        self.config["bits"] = bits

    def embed(self, t: int, grid: Tensor) -> Tensor:
        """Code vectors ``(B, n_t, D)``, of length 1. The cosine of two is ``1 - 2 h / D``, h the bits that differ."""
        return (2 * grid - 1) * self.depth**-0.5

    def code_distances(self) -> Tensor:
        """Of a bit: ``4 / D`` from the other value, so that a token's distances are in proportion to Hamming's."""
        return (1 - torch.eye(2, device=self.device)) * 4 / self.depth

    def nearest(self, vectors: Tensor) -> Tensor:
        """The signs, ``(..., D)`` to int64 ``(..., D)``: 1 above zero. The vectors' length does not matter."""
        return (vectors > 0).long()

    def swapped(self, grid: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """Every bit flipped with a probability of ``share``, as in Infinity's bitwise self-correction."""
        flip = torch.rand(grid.shape, generator=generator, device=grid.device) < share
        return torch.where(flip, 1 - grid, grid)


def bit_entropies(vectors: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """How undecided single bits are, and how much the bits are used: means over D, in nats, at most log 2.

    BSQ's entropy regularisation lowers the first and raises the second. It softens the choice of a code c for a vector
    u of length 1 to a distribution proportional to ``exp(-sharpness |u - c|^2)``, which is one of independent bits,
    ``p_d = sigmoid(4 sharpness u_d / sqrt(D))``. The first result is the mean entropy of these, and the second the
    entropy of their mean. It takes the bits of the mean as independent too, as the paper does.

    Args:
        vectors: ``(N, D)``, of any length.
        sharpness: the inverse temperature, above 0.
    """
    unit = F.normalize(vectors, dim=-1)
    p = (4 * sharpness * unit / vectors.shape[-1] ** 0.5).sigmoid()  # (N, D)
    return _binary_entropy(p).mean(), _binary_entropy(p.mean(0)).mean()


def _binary_entropy(p: Tensor) -> Tensor:
    """Of a bit that is 1 with probability p, in nats."""
    p = p.clamp(1e-6, 1 - 1e-6)  # the gradient is infinite at 0 and 1
    return torch.special.entr(p) + torch.special.entr(1 - p)
