"""The visual tokenizer: VAR's multi-scale residual vector quantiser (Tian et al., 2024, arXiv 2404.02905).

An image becomes T token grids, coarse to fine, that share one codebook (or, in ``bits.py``, have none).
Encoding walks the scales::

    residual = features                                        # (B, C, H, W)
    for t:  a_t      = nearest codes of area_downsample(residual, h_t x w_t)
            residual = residual - phi_t(upsample(codebook[a_t]))

and decoding adds the same terms up on a *canvas*, the accumulated feature map of the tokens so far, which a small
convolutional network turns into pixels at any t. The canvas is the whole state of the image: policies read
their input from it, and a fork copies it.

Images are cut into 8-pixel patches by a reshape, and all convolutions run on the 8 x 8 patch grid, which makes it
cheap on a CPU. Everything here is a pure function of its inputs; nothing changes a canvas in place.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer, from_unit, to_unit
from var_env.weights import load_config_and_weights, load_weights, save_module

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8)], patch=8)  # 130 tokens
MAKER = "vartext pretrain tokenizer"


class MultiScaleTokenizer(VisualTokenizer):
    """The residual quantiser over scales, whatever it rounds a vector to: a code of a codebook, or bits.

    A kind of quantiser adds `embed`, the vectors of codes, `nearest`, the codes of vectors, and `swapped`, codes with
    mistakes.

    Args:
        schedule: the grids; the last one times ``schedule.patch`` is the image size in pixels.
        channels: channels of a code vector and of the canvas, ``C``.
        width: channels of the convolutional encoder and decoder.
        blocks: residual blocks in each of them.
        world: the name of the rendered world that it is for, other than the small one.
    """

    maker = MAKER  # what makes its files, for errors
    shipped: str | None = None  # its file in var_env/assets

    def __init__(self, schedule: ScaleSchedule, channels: int, width: int, blocks: int, world: str | None) -> None:
        super().__init__()
        self.schedule, self.channels, self.world = schedule, channels, world
        self.config = {
            "grids": [list(grid) for grid in schedule.grids],
            "patch": schedule.patch,
            "width": width,
            "blocks": blocks,
        } | ({} if world is None else {"world": world})
        pixels = 3 * schedule.patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(schedule.patch),
            nn.Conv2d(pixels, width, 1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.Conv2d(width, pixels, 1),
            nn.PixelShuffle(schedule.patch),
        )
        self.phi = nn.ModuleList(Phi(channels) for _ in schedule.grids)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abstractmethod
    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest code vectors, ``(..., C)`` to int64 ``(..., D)``."""

    @abstractmethod
    def swapped(self, grid: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """A grid ``(B, n_t, D)`` with a share of its codes replaced, each by one that a policy may confuse it with."""

    # The interface that any VAR model can fill --------------------------------------------------------------------

    def blank(self, batch: int) -> Tensor:
        """The canvas before any token: zeros ``(B, C, H, W)``."""
        height, width = self.schedule.grids[-1]
        return torch.zeros(batch, self.channels, height, width, device=self.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """uint8 images ``(B, S, S, 3)`` to T grids ``(B, n_t, D)``."""
        return self.quantise(self.features(to_unit(images)))[0]

    def write(self, t: int, canvas: Tensor, grid: Tensor) -> Tensor:
        """A new canvas with grid t ``(B, n_t, D)`` added."""
        return canvas + self.contribution(t, grid)

    def read(self, t: int, canvas: Tensor) -> Tensor:
        """What a policy sees before it predicts grid t: the canvas at that grid's size, ``(B, n_t, C)``."""
        return self.pooled(t, canvas)

    @torch.no_grad()
    def decode(self, canvas: Tensor) -> Tensor:
        """The image of a canvas at any t: uint8 ``(B, S, S, 3)``."""
        return from_unit(self.decoder(canvas))

    # Its parts, which pretraining uses too -----------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], ``(B, 3, S, S)``, to the feature map ``(B, C, H, W)``."""
        return self.encoder(images)

    def pooled(self, t: int, features: Tensor) -> Tensor:
        """Features ``(B, C, H, W)`` at the size of grid t, means over areas: ``(B, n_t, C)``."""
        return F.adaptive_avg_pool2d(features, self.schedule.grids[t]).flatten(2).transpose(1, 2)

    def contribution(self, t: int, grid: Tensor) -> Tensor:
        """What grid t adds to the canvas, ``(B, C, H, W)``."""
        return self.spread(t, self.embed(t, grid))

    def spread(self, t: int, codes: Tensor) -> Tensor:
        """Code vectors ``(B, n_t, C)`` upsampled to the canvas and smoothed by phi_t, ``(B, C, H, W)``."""
        coarse = codes.transpose(1, 2).unflatten(2, self.schedule.grids[t])  # (B, C, h_t, w_t)
        return self.phi[t](F.interpolate(coarse, size=self.schedule.grids[-1], mode="bilinear", align_corners=False))

    @torch.no_grad()
    def quantise(
        self, features: Tensor, swap: float = 0.0, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features ``(B, C, H, W)`` to T grids written on the canvas and T grids of labels, each ``(B, n_t, D)``.

        The two are the same unless ``swap`` is above 0: then that fraction of the written codes is `swapped`, and the
        later grids quantise what this left over. A policy that is trained on such grids sees its own kind of mistake
        and learns to correct it at the next scale (exposure bias; Infinity's bitwise self-correction, arXiv
        2412.04431).
        """
        written, labels, residual = [], [], features
        for t in range(len(self.schedule)):
            label = grid = self.nearest(self.pooled(t, residual))
            if swap > 0:
                grid = self.swapped(label, swap, generator)
            residual = residual - self.contribution(t, grid)
            written.append(grid)
            labels.append(label)
        return written, labels

    # Files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write weights and configuration to one safetensors file; ``half`` halves it (bfloat16)."""
        save_module(self, path, half)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Read a file that :meth:`save` wrote; without a path, the shipped weights if there are any. Frozen, in eval
        mode."""
        if path is None and cls.shipped is not None:
            with resources.as_file(resources.files("var_env") / "assets" / cls.shipped) as shipped:
                return cls.load(shipped)
        config, weights = load_config_and_weights(path or "(none given)", cls.maker)
        schedule = ScaleSchedule(config.pop("grids"), config.pop("patch"))
        tokenizer = cls(schedule, **config)
        load_weights(tokenizer, weights, path or "")
        return tokenizer.eval().requires_grad_(False)


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(gelu(norm(x))))), on the patch grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(F.gelu(self.norm(x)))))


class Phi(nn.Module):
    """VAR's phi: half the upsampled codes, half a 3 x 3 convolution of them, to undo the upsampling's blur."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.5 * self.conv(x)
