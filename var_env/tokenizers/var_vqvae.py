"""The visual tokenizer of FoundationVision's VAR (Tian et al., 2024, arXiv 2404.02905), for its public weights.

The quantiser is that of `Tokenizer`, and so is everything that the environment asks of it. What differs are the
networks, the convolutional encoder and decoder of VQGAN with 16 pixels a token, and phi: codes are upsampled
bicubically, and the scales share four convolutions.

Modules are named as in the public state dict, so that ``vae_ch160v4096z32.pth`` loads as it is. Get it with
``hf download FoundationVision/var vae_ch160v4096z32.pth --local-dir .``; all models of the paper, of 256 and of 512
pixels, use this one. The public option ``using_znorm`` is off in it and absent here.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer, from_unit
from var_env.tokenizers.vq import Tokenizer

PATCH = 16  # px a token: four halvings
MULTIPLIERS = (1, 1, 2, 2, 4)  # channels at each resolution, fine to coarse, in units of `width`
PHIS = 4  # convolutions that the scales share
VAR_256 = ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)], PATCH)  # 680 tokens; d16 to d30
VAR_512 = ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)], PATCH)  # 2240 tokens; d36


class VARTokenizer(Tokenizer):
    """Images to VAR's token grids and back. The defaults are the public model's sizes.

    The canvas is the paper's f_hat, ``(B, C, H, W)``, and `read` pools it to the next grid's size.

    Args:
        schedule: square grids, the last of which times 16 is the image size; `VAR_256` or `VAR_512`.
        vocab_size: codes in the shared codebook, ``V``.
        channels: of a code and of the canvas, ``C``.
        width: channels of the encoder and the decoder at full resolution; four times as many at the lowest.

    Raises:
        ValueError: the schedule's patch is not 16 pixels.

    Examples:
        >>> tokenizer = VARTokenizer.load_public("vae_ch160v4096z32.pth", VAR_512)  # doctest: +SKIP
        >>> tokenizer.save("vae_512.safetensors")  # doctest: +SKIP
    """

    maker = "VARTokenizer.load_public(PTH).save(PATH)"
    shipped = None

    def __init__(
        self, schedule: ScaleSchedule = VAR_256, vocab_size: int = 4096, channels: int = 32, width: int = 160
    ) -> None:
        VisualTokenizer.__init__(self)  # past Tokenizer's own, which makes other networks
        if schedule.patch != PATCH:
            raise ValueError(f"VAR's tokenizer has {PATCH} pixels a token, the schedule has patch={schedule.patch}")
        self.schedule, self.vocab_size, self.channels = schedule, vocab_size, channels
        self.config = {
            "grids": [list(grid) for grid in schedule.grids],
            "patch": PATCH,
            "vocab_size": vocab_size,
            "channels": channels,
            "width": width,
        }
        self.encoder = encoder(width, channels)
        self.decoder = decoder(width, channels)
        self.quant_conv, self.post_quant_conv = conv(channels, channels), conv(channels, channels)
        self.smooth = [phi_index(t, len(schedule)) for t in range(len(schedule))]  # which phi each scale has
        phis = nn.ModuleList(conv(channels, channels) for _ in range(PHIS))
        self.quantize = nn.ModuleDict(
            {"embedding": nn.Embedding(vocab_size, channels), "quant_resi": nn.ModuleDict({"qresi_ls": phis})}
        )

    @property
    def codebook(self) -> Tensor:  # type: ignore[override]
        """``(V, C)``."""
        return self.quantize.get_parameter("embedding.weight")

    def features(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def spread(self, t: int, codes: Tensor) -> Tensor:
        coarse = codes.transpose(1, 2).unflatten(2, self.schedule.grids[t])  # (B, C, h_t, w_t)
        h = F.interpolate(coarse, size=self.schedule.grids[-1], mode="bicubic")
        phi = self.quantize.get_submodule(f"quant_resi.qresi_ls.{self.smooth[t]}")
        return 0.5 * h + 0.5 * phi(h)

    @torch.no_grad()
    def decode(self, canvas: Tensor) -> Tensor:
        return from_unit(self.decoder(self.post_quant_conv(canvas)))

    @classmethod
    def load_public(cls, path: str | Path, schedule: ScaleSchedule = VAR_256) -> VARTokenizer:
        """Read the public ``vae_ch160v4096z32.pth``, or one of other sizes, which its shapes tell. Frozen, eval mode.

        Raises:
            FileNotFoundError: there is no such file; the message says how to get it.
            ValueError: it is no such file, or a name or a shape in it does not fit.
        """
        weights = read_public(path, "VAR tokenizer", ("encoder.conv_in.weight", "quantize.embedding.weight"))
        vocab_size, channels = weights["quantize.embedding.weight"].shape
        with torch.device("meta"):
            tokenizer = cls(schedule, vocab_size, channels, len(weights["encoder.conv_in.weight"]))
        load_public_weights(tokenizer, weights, ("ema_vocab_hit_SV",), path)
        return tokenizer.eval().requires_grad_(False)


def phi_index(t: int, scales: int) -> int:
    """Which of the four phi smooths scale t: that whose tick in [0, 1] is nearest to ``t / (T - 1)``.

    Some scales lie half-way between two ticks but for rounding (2 and 7 of 10), and the public model was trained with
    what float64 makes of it; so the arithmetic is theirs.
    """
    ticks = np.linspace(1 / 3 / PHIS, 1 - 1 / 3 / PHIS, PHIS)
    return int(np.argmin(np.abs(ticks - t / max(scales - 1, 1))))


# The networks --------------------------------------------------------------------------------------------------------


def encoder(
    width: int, channels: int, multipliers: Sequence[int] = MULTIPLIERS, attention: bool = True
) -> nn.Sequential:
    """Images ``(B, 3, S, S)`` to features ``(B, channels, S / 16, S / 16)``, attention at the lowest resolution."""
    wide, levels, entering = width * multipliers[-1], [], width
    for i, leaving in enumerate(width * m for m in multipliers):
        lowest = i == len(multipliers) - 1
        halve = None if lowest else named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(leaving, leaving, 3, stride=2))
        levels.append(Level(entering, leaving, 2, attention=attention and lowest, downsample=halve))
        entering = leaving
    return named(
        conv_in=conv(3, width),
        down=nn.Sequential(*levels),
        mid=middle(wide, attention),
        norm_out=norm(wide),
        act=nn.SiLU(),
        conv_out=conv(wide, channels),
    )


def decoder(
    width: int, channels: int, multipliers: Sequence[int] = MULTIPLIERS, attention: bool = True
) -> nn.Sequential:
    """Features ``(B, channels, h, w)`` to images ``(B, 3, 16 h, 16 w)``, about in [-1, 1]."""
    wide, levels, entering = width * multipliers[-1], [], width * multipliers[-1]
    for i, leaving in reversed(list(enumerate(width * m for m in multipliers))):
        lowest = i == len(multipliers) - 1
        double = named(nearest=nn.Upsample(scale_factor=2), conv=conv(leaving, leaving)) if i else None
        levels.append(Level(entering, leaving, 3, attention=attention and lowest, upsample=double))
        entering = leaving
    return named(
        conv_in=conv(channels, wide),
        mid=middle(wide, attention),
        up=FromTheLast(*reversed(levels)),  # level 0 is the finest, as in the encoder
        norm_out=norm(width),
        act=nn.SiLU(),
        conv_out=conv(width, 3),
    )


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where there is some, then the way to the next."""

    def __init__(
        self,
        entering: int,
        leaving: int,
        blocks: int,
        attention: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(leaving if i else entering, leaving) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(leaving) if attention else nn.Identity() for _ in range(blocks))
        self.downsample, self.upsample = downsample or nn.Identity(), upsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


class FromTheLast(nn.Sequential):
    """Modules that run from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 convolution where the channels change."""

    def __init__(self, entering: int, leaving: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(entering), conv(entering, leaving)
        self.norm2, self.conv2 = norm(leaving), conv(leaving, leaving)
        self.nin_shortcut = nn.Identity() if entering == leaving else conv(entering, leaving, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """x + attention of all positions to each other, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.proj_out = conv(channels, 3 * channels, 1), conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # each (B, h * w, C)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


def middle(channels: int, attention: bool) -> nn.Sequential:
    """What stands between the ways down and up."""
    first, second = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
    between = AttentionBlock(channels) if attention else nn.Identity()
    return named(block_1=first, attn_1=between, block_2=second)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, by name."""
    return nn.Sequential(OrderedDict(modules))


def conv(entering: int, leaving: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(entering, leaving, size, padding=size // 2)


def norm(channels: int) -> nn.GroupNorm:
    """32 groups, fewer in models too small for them."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


# The public files, of tokenizer and transformer ----------------------------------------------------------------------


def read_public(
    path: str | Path,
    what: str,
    names: Sequence[str],
    repository: str = "FoundationVision/var",
    files: str = "The tokenizer is vae_ch160v4096z32.pth, the transformers are var_d16.pth to var_d36.pth",
) -> dict[str, Any]:
    """The state dict in a ``.pth`` file of a repository of the hub, which has to have some names.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
        ValueError: it cannot be read without running code, or holds something else than ``what``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: get them with `hf download {repository} {path.name} --local-dir {path.parent}`"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"cannot read weights from {path}, corrupt or no .pth of tensors: {error}") from error
    for name in names:
        if not isinstance(weights, dict) or name not in weights:
            raise ValueError(f"{path} holds no {what} in the layout of {repository}: there is no {name}. {files}")
    return weights


def load_public_weights(
    module: nn.Module, weights: dict[str, Tensor], derived: Collection[str], path: str | Path
) -> None:
    """Give a module, which may be on the meta device, the weights of a public file as float32.

    Every name and shape has to fit, but for ``derived``: buffers that the public code keeps in its files and that
    follow from the configuration, or serve its training only.
    """
    kept = {name: w.float() for name, w in weights.items() if name.rpartition(".")[2] not in derived}
    try:
        module.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit a {type(module).__name__}: {error}") from error
