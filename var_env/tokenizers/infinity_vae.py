"""The visual tokenizer of FoundationVision's Infinity (Han et al., 2024, arXiv 2412.04431), for its public weights.

The quantiser is that of `BitTokenizer`, 32 bits a token and 16 pixels a token. What differs are the networks, the
convolutional encoder and decoder of VQGAN without attention. There is no phi, codes are upsampled linearly, and a
policy reads the canvas by linear interpolation, too, down as well as up.

Get the public file with ``hf download FoundationVision/Infinity infinity_vae_d32reg.pth --local-dir .``. Its modules
carry one more name, "conv" or "norm", than ours. Absent here: the variant of 8 pixels a token, whose grids the public
code folds 2 x 2 ("spatial patchify"), images that are not square, and video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer, from_unit
from var_env.tokenizers.bits import BitTokenizer
from var_env.tokenizers.var_vqvae import decoder, encoder, load_public_weights, read_public

PATCH = 16  # px a token: four halvings
MULTIPLIERS = (1, 2, 4, 4, 4)  # channels at each resolution, fine to coarse, in units of `width`
REPOSITORY = "FoundationVision/Infinity"
SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of the square grids at 1024 pixels
RESOLUTIONS = {256: 7, 512: 10, 768: 12, 1024: 13}  # px to the number of grids, the beginning of these


def infinity_schedule(resolution: int) -> ScaleSchedule:
    """The public schedule for square images. ``ValueError`` for a resolution that it does not have.

    Examples:
        >>> infinity_schedule(256).grids[-1]
        (16, 16)
    """
    if resolution not in RESOLUTIONS:
        available = ", ".join(map(str, RESOLUTIONS))
        raise ValueError(f"Infinity has no schedule for {resolution} pixels: choose one of {available}")
    return ScaleSchedule([(side, side) for side in SIDES[: RESOLUTIONS[resolution]]], PATCH)


class InfinityTokenizer(BitTokenizer):
    """Images to Infinity's grids of bits and back. The defaults are the public model's sizes.

    Args:
        schedule: square grids, the last of which times 16 is the image size; see `infinity_schedule`.
        bits: D, which is also the number of channels of the canvas.
        width: channels of the encoder and the decoder at full resolution; four times as many at the lowest.

    Raises:
        ValueError: the schedule's patch is not 16 pixels.

    Examples:
        >>> tokenizer = InfinityTokenizer.load_public("infinity_vae_d32reg.pth", 1024)  # doctest: +SKIP
        >>> tokenizer.save("infinity_vae.safetensors")  # doctest: +SKIP
    """

    maker = "InfinityTokenizer.load_public(PTH)"

    def __init__(self, schedule: ScaleSchedule, bits: int = 32, width: int = 128) -> None:
        VisualTokenizer.__init__(self)  # past BitTokenizer's own, which makes other networks
        if schedule.patch != PATCH:
            raise ValueError(f"this tokenizer has {PATCH} pixels a token, the schedule has patch={schedule.patch}")
        self.schedule, self.depth, self.channels = schedule, bits, bits
        self.config = {"grids": [list(grid) for grid in schedule.grids], "patch": PATCH, "bits": bits, "width": width}
        self.encoder = encoder(width, bits, MULTIPLIERS, attention=False)
        self.decoder = decoder(width, bits, MULTIPLIERS, attention=False)

    def read(self, t: int, canvas: Tensor) -> Tensor:
        return F.interpolate(canvas, self.schedule.grids[t], mode="bilinear").flatten(2).transpose(1, 2)

    def spread(self, t: int, codes: Tensor) -> Tensor:
        coarse = codes.transpose(1, 2).unflatten(2, self.schedule.grids[t])  # (B, C, h_t, w_t)
        return F.interpolate(coarse, self.schedule.canvas, mode="bilinear")

    @torch.no_grad()
    def decode(self, canvas: Tensor) -> Tensor:
        return from_unit(self.decoder(canvas))

    @classmethod
    def load_public(cls, path: str | Path, resolution: int = 1024) -> InfinityTokenizer:
        """Read the public ``infinity_vae_d32reg.pth``, or one of other sizes, which its shapes tell. Frozen, eval mode.

        Raises:
            FileNotFoundError: there is no such file; the message says how to get it.
            ValueError: it is no such file, a name or a shape in it does not fit, or there is no such resolution.
        """
        schedule = infinity_schedule(resolution)
        files = "The tokenizer of the 2B model is infinity_vae_d32reg.pth"
        weights = unwrapped(read_public(path, "Infinity tokenizer", ("vae",), REPOSITORY, files)["vae"])
        shapes = {name: weights[name].shape for name in weights if name.endswith("conv_in.weight")}
        if len(shapes) != 2:
            raise ValueError(f"{path} holds no Infinity tokenizer: it has no encoder.conv_in and decoder.conv_in")
        with torch.device("meta"):
            tokenizer = cls(schedule, shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_in.weight"][0])
        load_public_weights(tokenizer, weights, ("mask",), path)
        return tokenizer.eval().requires_grad_(False)


def unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the name that the public code's wrappers add: ``conv1.conv.weight`` is our ``conv1.weight``."""
    return {_unwrapped(name.split(".")): weight for name, weight in weights.items()}


def _unwrapped(name: Sequence[str]) -> str:
    wrapped = len(name) > 2 and name[-2] in ("conv", "norm")
    return ".".join([*name[:-2], name[-1]] if wrapped else name)
