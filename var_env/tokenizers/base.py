"""The interface of a visual tokenizer: what the environment and the policies ask of it.

An image is T token grids, and the *canvas* is all that is known of it so far: grids are written on it one after the
other, policies read their input from it, and at any time it can be decoded. Everything is a pure function of its
inputs. Forks of an episode share a canvas, so nothing may change one in place.

`B` batch, `n_t` tokens of grid t, `D` codes a token, `V` values a code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, device, nn

from var_env.hub import HubMixin, by_name
from var_env.schedule import ScaleSchedule


class VisualTokenizer(nn.Module, HubMixin, ABC):
    """Base class of the tokenizers.

    Attributes:
        schedule: the grids.
        vocab_size: V; every code is one of ``0 .. V - 1``.
        depth: D, codes a token: 1 for vector quantisers, the number of bits for bitwise ones, which have V = 2.
        channels: C, of the features that `read` gives.
        config: what the constructor takes, in JSON's types; kept in files.
        world: the name of the rendered world that it was trained on, see ``var_env/worlds.py``; ``None`` is unknown.
    """

    schedule: ScaleSchedule
    vocab_size: int
    channels: int
    config: dict[str, Any]
    depth: int = 1
    world: str | None = None
    hub_kind, hub_loader = "tokenizer", ("var_env.tokenizers", "VisualTokenizer")

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.schedule.canvas[0] * self.schedule.patch

    @property
    def device(self) -> device:
        """Where the canvas is."""
        return next(iter(self.state_dict().values())).device

    @abstractmethod
    def blank(self, batch: int) -> Tensor:
        """The canvas before any token, batch first."""

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """uint8 images ``(B, S, S, 3)`` to T grids, int64 ``(B, n_t, D)``."""

    @abstractmethod
    def write(self, t: int, canvas: Tensor, grid: Tensor) -> Tensor:
        """A new canvas with grid t ``(B, n_t, D)`` on it."""

    @abstractmethod
    def read(self, t: int, canvas: Tensor) -> Tensor:
        """What a policy sees of the canvas before it predicts grid t, ``(B, n_t, C)``."""

    @abstractmethod
    def embed(self, t: int, grid: Tensor) -> Tensor:
        """A vector for each token of grid t, ``(B, n_t, E)``, near for tokens that look alike; for STAGE."""

    def code_distances(self) -> Tensor:
        """Squared distances between the V values of a code, ``(V, V)``; those of a token's D codes add up.

        Of the vectors that `embed` gives at the last grid. A tokenizer of several codes a token says what its are.
        """
        if self.depth > 1:
            raise NotImplementedError(
                f"{type(self).__name__} has {self.depth} codes a token and no code_distances(), which soft_codes needs"
            )
        codes = torch.arange(self.vocab_size, device=self.device).view(-1, 1, 1)
        last = len(self.schedule) - 1
        vectors = self.embed(last, codes.expand(-1, self.schedule.sizes[last], 1))[:, 0].float()  # (V, E)
        return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()

    @abstractmethod
    def decode(self, canvas: Tensor) -> Tensor:
        """The image of a canvas at any t: uint8 ``(B, S, S, 3)``."""

    def read_all(self, grids: Sequence[Tensor], until: int, batch: int) -> list[Tensor]:
        """``read`` for grids 0 to ``until``, each from the canvas of those before it; for teacher forcing.

        ``grids`` holds at least the first ``until``. A tokenizer that can do without writing them one by one overrides
        this.
        """
        canvas = self.blank(batch)
        features = [self.read(0, canvas)]
        for t in range(until):
            canvas = self.write(t, canvas, grids[t])
            features.append(self.read(t + 1, canvas))
        return features

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write weights and configuration to one safetensors file, for `load_tokenizer`."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path | None = None) -> VisualTokenizer:
        """Read a file that :meth:`save` wrote; frozen, in eval mode."""

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory / "tokenizer.safetensors")
        self._write_config(save_directory)

    @classmethod
    def _from_folder(cls, folder: Path, **options: Any) -> Any:
        return by_name("var_env.tokenizers.registry:load_tokenizer")(folder / "tokenizer.safetensors", **options)


def to_unit(images: Tensor) -> Tensor:
    """uint8 ``(B, S, S, 3)`` to float in [-1, 1], ``(B, 3, S, S)``."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def from_unit(images: Tensor) -> Tensor:
    """Float ``(B, 3, S, S)`` to uint8 ``(B, S, S, 3)``, clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
