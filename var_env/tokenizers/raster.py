"""Raster autoregression in the same environment: one grid of tokens, drawn token by token, row by row.

The image is quantised once, at one scale, and every token is a step of its own. This is what plain autoregressive
models do (LlamaGen, Janus), and the degenerate case of next-scale prediction: T = H * W grids of 1 x 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.residual import MAKER
from var_env.tokenizers.vq import Tokenizer
from var_env.weights import load_config_and_weights, load_weights, save_module


class RasterTokenizer(VisualTokenizer):
    """A tokenizer of one scale, its tokens as steps. The canvas ``(B, C, H, W)`` holds their code vectors.

    A policy reads the vector of the token before its own, zeros at first; the rest it knows from its cache.

    Args:
        grid: the tokenizer of one scale.

    Raises:
        ValueError: it has more than one scale.
    """

    def __init__(self, grid: Tokenizer) -> None:
        super().__init__()
        if len(grid.schedule) != 1:
            raise ValueError(f"a raster has one scale, the tokenizer has {len(grid.schedule)}: {grid.schedule.grids}")
        self.grid, self.config = grid, grid.config
        self.schedule = ScaleSchedule.raster(grid.schedule.canvas, grid.schedule.patch)
        self.vocab_size, self.channels, self.world = grid.vocab_size, grid.channels, grid.world

    @property
    def codebook(self) -> Tensor:
        """``(V, C)``."""
        return self.grid.codebook

    def blank(self, batch: int) -> Tensor:
        return self.grid.blank(batch)

    def encode(self, images: Tensor) -> list[Tensor]:
        return list(self.grid.encode(images)[0].split(1, dim=1))

    def write(self, t: int, canvas: Tensor, grid: Tensor) -> Tensor:
        row, column = divmod(t, self.schedule.canvas[1])
        written = canvas.clone()
        written[:, :, row, column] = self.embed(t, grid).squeeze(1)
        return written

    def read(self, t: int, canvas: Tensor) -> Tensor:
        if t == 0:
            return torch.zeros_like(canvas[:, :, 0, :1].transpose(1, 2))  # (B, 1, C)
        row, column = divmod(t - 1, self.schedule.canvas[1])
        return canvas[:, None, :, row, column]

    def read_all(self, grids: Sequence[Tensor], until: int, batch: int) -> list[Tensor]:
        start = torch.zeros(batch, 1, self.channels, device=self.device)
        if until == 0:
            return [start]
        return [start, *self.grid.embed(0, torch.cat(list(grids[:until]), 1)).split(1, dim=1)]

    def embed(self, t: int, grid: Tensor) -> Tensor:
        return self.grid.embed(0, grid)

    def decode(self, canvas: Tensor) -> Tensor:
        return self.grid.decode(self.grid.phi[0](canvas))

    def features(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], ``(B, 3, S, S)``, to the feature map ``(B, C, H, W)``."""
        return self.grid.features(images)

    def quantise(
        self, features: Tensor, swap: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `Tokenizer.quantise`, T grids each; a swapped token is one that its successors see, and nothing else."""
        (written,), (labels,) = self.grid.quantise(features, swap, generator)
        return list(written.split(1, dim=1)), list(labels.split(1, dim=1))

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights and configuration to one safetensors file; ``half`` halves it (bfloat16)."""
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None) -> RasterTokenizer:
        """Read a file that :meth:`save` wrote; no weights are shipped. Frozen, in eval mode."""
        config, weights = load_config_and_weights(path or "(none given)", MAKER)
        schedule = ScaleSchedule(config.pop("grids"), config.pop("patch"))
        tokenizer = cls(Tokenizer(schedule, **config))
        load_weights(tokenizer, weights, path or "")
        return tokenizer.eval().requires_grad_(False)
