"""The contract of a reward: `(images, scenes) -> RewardOutput`, with its inputs and its output checked."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MIN_SIDE = 16  # pixels; smaller images hold no legible text


class HasWords(Protocol):
    """All that a reward asks of a scene: the words that the image should show."""

    @property
    def words(self) -> Sequence[str]: ...


@dataclass
class RewardOutput:
    """What a reward found in a batch of B images.

    Attributes:
        scores: (B,) float32, the reward. Finite, or the constructor raises ValueError naming the image.
        parts: named terms and metrics, each (B,) float32 and finite.
        words: per image, the words as they were read (not normalised). Empty lists for a reward without OCR.
        confidences: per image, one number in [0, 1] for each of `words`.
        regions: per image, the boxes of the text lines found, (n, 4) float32 as x0, y0, x1, y1 in pixels.
    """

    scores: NDArray[np.float32]  # (B,)
    parts: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    words: list[list[str]] = field(default_factory=list)
    confidences: list[list[float]] = field(default_factory=list)
    regions: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, dtype=np.float32)
        if self.scores.ndim != 1:
            raise ValueError(f"scores must have shape (B,), got {self.scores.shape}")
        count = len(self.scores)
        self.parts = {name: np.asarray(part, dtype=np.float32) for name, part in self.parts.items()}
        for name, values in {"score": self.scores, **self.parts}.items():
            if values.shape != (count,):
                raise ValueError(f"part {name!r} has shape {values.shape}, expected ({count},) as the scores")
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                raise ValueError(
                    f"the {name} of image {bad[0]} is {values[bad[0]]} ({bad.size} of {count} not finite); "
                    "check the image and the reward's options"
                )
        self.words = self.words or [[] for _ in range(count)]
        self.confidences = self.confidences or [[] for _ in range(count)]
        self.regions = self.regions or [np.zeros((0, 4), np.float32) for _ in range(count)]
        for name in ("words", "confidences", "regions"):
            length = len(getattr(self, name))
            if length != count:
                raise ValueError(f"{name} holds {length} entries, expected {count}, one an image")


class Reward(ABC):
    """From decoded images and their scenes to scores. Subclasses set `name` and implement `score`."""

    name: str

    def __call__(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        """Score a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            scenes: B objects with `.words`, a non-empty sequence of strings.

        Raises:
            ValueError: for images or scenes of another form, and for a score that is not finite.
        """
        check_images(images)
        check_scenes(scenes, len(images))
        output = self.score(images, scenes)
        if len(output.scores) != len(images):
            raise ValueError(f"reward {self.name!r} gave {len(output.scores)} scores, not {len(images)}")
        return output

    @abstractmethod
    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        """Score a batch that has been checked; see `__call__`."""


def check_images(images: NDArray[np.uint8]) -> None:
    """Raise ValueError, with the remedy, unless `images` is (B, H, W, 3) uint8 with sides of 16 or more."""
    wanted = "expected uint8 RGB images of shape (B, H, W, 3)"
    if not isinstance(images, np.ndarray):
        remedy = "call .cpu().numpy() on a tensor, np.stack on a list of arrays"
        raise ValueError(f"{wanted} as a numpy array, got {type(images).__name__}; {remedy}")
    shape = images.shape
    if images.ndim == 3:
        raise ValueError(f"{wanted}, got {shape}; add the batch axis to a single image: images[None]")
    if images.ndim != 4:
        raise ValueError(f"{wanted}, got {shape}")
    if shape[3] != 3:
        remedy = {1: "repeat the grey channel: images.repeat(3, axis=-1)", 4: "drop alpha: images[..., :3]"}
        if shape[1] == 3:
            hint = "move the channels last: images.transpose(0, 2, 3, 1)"
        else:
            hint = remedy.get(shape[3], "the last axis must be R, G, B")
        raise ValueError(f"{wanted}, got {shape}; {hint}")
    if min(shape[1:3]) < MIN_SIDE:
        raise ValueError(f"{wanted} with sides of at least {MIN_SIDE} pixels, got {shape[1]} x {shape[2]}")
    if images.dtype != np.uint8:
        values = f" with values in [{images.min():.3g}, {images.max():.3g}]" if images.size else ""
        if np.issubdtype(images.dtype, np.floating):
            hint = "for values in [0, 1] multiply by 255, clip to [0, 255] and cast: .astype(np.uint8)"
        else:
            hint = "rescale to [0, 255] and cast: .astype(np.uint8)"
        raise ValueError(f"{wanted}, got dtype {images.dtype}{values}; {hint}")


def check_scenes(scenes: Sequence[HasWords], count: int) -> None:
    """Raise ValueError unless there are `count` scenes, each with target words and no blank one."""
    if len(scenes) != count:
        raise ValueError(f"got {len(scenes)} scenes for {count} images; pass one scene an image")
    for index, scene in enumerate(scenes):
        words = getattr(scene, "words", None)
        if words is None or isinstance(words, str):
            raise ValueError(f"scene {index} ({scene!r:.80}) needs `.words`, a sequence of strings; got {words!r:.80}")
        if not words:
            raise ValueError(f"scene {index} has no target words; a text reward needs at least one")
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"target word {word!r} of scene {index} is not a non-blank string")
