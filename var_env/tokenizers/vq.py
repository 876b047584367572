"""The tokenizer of the small world: residual vector quantisation over scales, with one codebook for all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.residual import DEFAULT_SCHEDULE, MultiScaleTokenizer


class Tokenizer(MultiScaleTokenizer):
    """Images to token grids and back. ``D`` (codes a position) is 1; grids are int64 ``(B, n_t, 1)``.

    Args:
        schedule: the grids; the last one times ``schedule.patch`` is the image size in pixels.
        vocab_size: codes in the shared codebook, ``V``.
        channels: channels of a code and of the canvas, ``C``.
        width: channels of the convolutional encoder and decoder.
        blocks: residual blocks in each of them.
        world: the name of the rendered world that it is for, other than the small one.
    """

    shipped: str | None = "tokenizer.safetensors"

    def __init__(
        self,
        schedule: ScaleSchedule = DEFAULT_SCHEDULE,
        vocab_size: int = 512,
        channels: int = 16,
        width: int = 128,
        blocks: int = 2,
        world: str | None = None,
    ) -> None:
        super().__init__(schedule, channels, width, blocks, world)
        self.vocab_size = vocab_size
        self.config |= {"vocab_size": vocab_size, "channels": channels}
        self.codebook: Tensor
        self.register_buffer("codebook", torch.randn(vocab_size, channels))  # (V, C)

    def embed(self, t: int, grid: Tensor) -> Tensor:
        """Code vectors of grid t, ``(B, n_t, C)``."""
        return F.embedding(grid.squeeze(-1), self.codebook)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Indices of the nearest codes, ``(..., C)`` to int64 ``(..., 1)``."""
        scores = vectors @ self.codebook.T - self.codebook.square().sum(-1) / 2  # (..., V); |v|^2 is common to all
        return scores.argmax(-1, keepdim=True)

    def swapped(self, grid: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """A share of the codes replaced, each by one of its 16 nearest neighbours in the codebook."""
        near = self._neighbours(16)  # (V, 16)
        pick = torch.randint(near.shape[1], grid.shape, generator=generator, device=grid.device)
        flip = torch.rand(grid.shape, generator=generator, device=grid.device) < share
        return torch.where(flip, near[grid.squeeze(-1)].gather(-1, pick), grid)

    def _neighbours(self, count: int) -> Tensor:
        """The codes nearest to each code, itself left out: int64 ``(V, count)``, fewer in a smaller codebook."""
        distances = torch.cdist(self.codebook, self.codebook).fill_diagonal_(torch.inf)
        return distances.topk(min(count, self.vocab_size - 1), largest=False).indices
