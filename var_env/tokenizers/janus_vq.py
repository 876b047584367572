"""Janus-Pro's visual tokenizer (arXiv 2501.17811), which is LlamaGen's (arXiv 2406.06525), as transformers has it.

A VQ autoencoder of one scale: 384-pixel images are 24 x 24 tokens of 16 pixels, of 16384 codes with 8 channels, drawn
row by row. Codes are unit vectors: the stored ones are normalised wherever they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import from_unit, to_unit
from var_env.tokenizers.raster import RasterTokenizer
from var_env.weights import load_config_and_weights, load_weights

ROWS = 16  # images that pass through the convolutions at once: a layer at 384 pixels takes 75 MB for each


class JanusTokenizer(RasterTokenizer):
    """Janus-Pro's tokenizer, its tokens as steps. The canvas ``(B, C, H, W)`` holds unit code vectors.

    `JanusPolicy.from_pretrained` makes one from a public checkpoint.

    Args:
        config: of transformers' ``JanusVQVAE``; ``num_patches`` is the number of tokens along a side.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(JanusVQ(config))  # type: ignore[arg-type]

    def decode(self, canvas: Tensor) -> Tensor:
        return self.grid.decode(canvas)

    @classmethod
    def load(cls, path: str | Path | None = None) -> JanusTokenizer:
        """Read a file that :meth:`save` wrote; no weights are shipped. Frozen, in eval mode."""
        config, weights = load_config_and_weights(path or "(none given)", "JanusPolicy.from_pretrained")
        tokenizer = cls(config)
        load_weights(tokenizer, weights, path or "")
        return tokenizer.eval().requires_grad_(False)


class JanusVQ(nn.Module):
    """transformers' ``JanusVQVAE`` as a tokenizer of one scale; what `RasterTokenizer` asks of one."""

    world: str | None = None  # of photographs, and of no rendered world

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import JanusVQVAE, JanusVQVAEConfig

        super().__init__()
        self.config = dict(config)
        self.vq = JanusVQVAE(JanusVQVAEConfig(**config))
        own = self.vq.config
        self.schedule = ScaleSchedule([(own.num_patches, own.num_patches)], 2 ** (len(own.channel_multiplier) - 1))
        self.vocab_size, self.channels = own.num_embeddings, own.embed_dim

    @property
    def codebook(self) -> Tensor:
        """Unit vectors ``(V, C)``."""
        return F.normalize(self.vq.quantize.embedding.weight, dim=-1)

    def blank(self, batch: int) -> Tensor:
        """The canvas before any token: zeros ``(B, C, H, W)``."""
        return self.vq.quantize.embedding.weight.new_zeros(batch, self.channels, *self.schedule.canvas)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """uint8 images ``(B, S, S, 3)`` to the one grid ``(B, H * W, 1)``.

        Both sides of the comparison are normalised, as in Janus's own code. ``JanusVQVAE.encode`` of transformers
        compares the vectors as they are, and finds other codes.
        """
        vectors = torch.cat([self.features(to_unit(part)) for part in images.split(ROWS)])  # (B, C, H, W)
        vectors = vectors.flatten(2).transpose(1, 2)  # (B, H * W, C); their length does not move the nearest direction
        return [(vectors @ self.codebook.T).argmax(-1, keepdim=True)]

    def features(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], ``(B, 3, S, S)``, to the feature map ``(B, C, H, W)``."""
        return self.vq.quant_conv(self.vq.encoder(images))

    def embed(self, t: int, grid: Tensor) -> Tensor:
        """Unit code vectors of tokens ``(B, n, 1)``, ``(B, n, C)``."""
        return F.normalize(self.vq.quantize.embedding(grid.squeeze(-1)), dim=-1)

    @torch.no_grad()
    def decode(self, canvas: Tensor) -> Tensor:
        """The image of a canvas at any t: uint8 ``(B, S, S, 3)``."""
        parts = [self.vq.decoder(self.vq.post_quant_conv(part)) for part in canvas.split(ROWS)]
        return from_unit(torch.cat(parts))
