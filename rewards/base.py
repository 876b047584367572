"""The contract of a reward: `(images, scenes) -> RewardOutput`, with its inputs and its output checked."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.components import Component, checked
from rewards.invisible import visible
from rewards.reason import reason

MIN_SIDE = 16  # pixels; smaller images hold no legible text


class HasWords(Protocol):
    """What a reward of text asks of a scene: the words that the image should show."""

    @property
    def words(self) -> Sequence[str]: ...


@dataclass
class RewardOutput:
    """What a reward found in a batch of B images.

    A reward, or a part of it, may not apply to a sample. `applicable` marks such a score; an entry that is None or
    masked (`numpy.ma`) marks such a part. Both become NaN here. Any other number that is not finite is an error, and
    the constructor raises ValueError naming the image.

    Attributes:
        scores: (B,) float32, the reward. Finite, and NaN where it is not applicable.
        parts: named terms and metrics, each (B,) float32. Finite, and NaN where the part is not applicable.
        words: per image, the words as they were read (not normalised). Empty lists for a reward without OCR.
        confidences: per image, one number in [0, 1] for each of `words`.
        regions: per image, the boxes of the text lines or objects found, (n, 4) float32 as x0, y0, x1, y1 in pixels.
        applicable: (B,) bool, where there is a score; everywhere, unless it is given.
        components: per image, the parts of its score with their places, see `Component`. They need not add up to the
            score. Empty lists for a reward that gives none.
        reads: whether the reward looks for words or regions at all, which it does if it gave a list of them.
        reads_words: whether it looks for words. True with empty lists, when it found none.
    """

    scores: NDArray[np.float32]  # (B,)
    parts: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    words: list[list[str]] = field(default_factory=list)
    confidences: list[list[float]] = field(default_factory=list)
    regions: list[NDArray[np.float32]] = field(default_factory=list)
    applicable: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # (B,)
    components: list[list[Component]] = field(default_factory=list)
    reads: bool = field(init=False)
    reads_words: bool = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, dtype=np.float32)
        if self.scores.ndim != 1:
            raise ValueError(f"scores must have shape (B,), got {self.scores.shape}")
        count = len(self.scores)
        self.applicable = np.asarray(self.applicable, bool) if len(self.applicable) else np.ones(count, bool)
        if self.applicable.shape != (count,):
            raise ValueError(f"applicable has shape {self.applicable.shape}, expected ({count},) as the scores")
        self.scores = finite("score", self.scores, ~self.applicable)
        for name, part in self.parts.items():
            if np.shape(part) != (count,):
                raise ValueError(f"part {name!r} has shape {np.shape(part)}, expected ({count},) as the scores")
        self.parts = {name: finite(name, part, absent(part)) for name, part in self.parts.items()}
        self.reads, self.reads_words = bool(self.words or self.regions), bool(self.words)
        self.words = self.words or [[] for _ in range(count)]
        self.confidences = self.confidences or [[] for _ in range(count)]
        self.regions = self.regions or [np.zeros((0, 4), np.float32) for _ in range(count)]
        self.components = [list(map(checked, found)) for found in self.components] or [[] for _ in range(count)]
        for name in ("words", "confidences", "regions", "components"):
            length = len(getattr(self, name))
            if length != count:
                raise ValueError(f"{name} holds {length} entries, expected {count}, one an image")


def absent(part: Any) -> NDArray[np.bool_]:
    """Which entries of a part are None or masked, and so not applicable."""
    if isinstance(part, np.ma.MaskedArray):
        return np.ma.getmaskarray(part)
    return np.array([value is None for value in part], bool)


def finite(name: str, values: Any, nothing: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The values as new float32, NaN where `nothing` and nowhere else; ValueError naming the first that is."""
    array = np.array(values, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array) & ~nothing)
    if bad.size:
        raise ValueError(
            f"the {name} of image {bad[0]} is {array.flat[bad[0]]} ({bad.size} of {len(array)} not finite); "
            "check the image and the reward's options"
        )
    array[nothing] = np.nan
    return array


class Reward(ABC):
    """From decoded images and their scenes to scores. Subclasses set `name` and implement `score`.

    A reward that needs something else of a scene than target words overrides `check_scenes`. A reward with bounded
    scores may state the lowest and the highest in `score_range`; `rewards.combine` scales by them.
    """

    name: str
    score_range: tuple[float, float] | None = None

    def __call__(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        """Score a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
            scenes: B objects that have what `check_scenes` asks for.

        Raises:
            ValueError: for images or scenes of another form, and for a score that is not finite.
            RuntimeError: for an exception of a library that says nothing; the message names its class and its line.
        """
        check_images(images)
        self.check_scenes(scenes, len(images))
        try:
            output = self.score(images, scenes)
        except Exception as error:
            if str(error).strip():
                raise
            raise RuntimeError(f"reward {self.name!r} failed: {reason(error)}") from error
        if len(output.scores) != len(images):
            raise ValueError(f"reward {self.name!r} gave {len(output.scores)} scores, not {len(images)}")
        return output

    def submit(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> "Future[RewardOutput]":
        """Score a batch as calling the reward does. Here the answer is there at once; a pool gives it later."""
        answer: Future[RewardOutput] = Future()
        answer.set_result(self(images, scenes))
        return answer

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes with what the reward needs; here, with target words."""
        check_scenes(scenes, count)

    def describe(self) -> dict[str, str]:
        """What decides the scores beside the options, such as the names of models; for the record of a run."""
        return {}

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
    convert = 'convert a file as it is opened: Image.open(FILE).convert("RGB")'
    if images.ndim == 3 and shape[2] == 3:
        raise ValueError(f"{wanted}, got {shape}; add the batch axis to a single image: images[None]")
    if images.ndim != 4:
        raise ValueError(f"{wanted}, got {shape}; {convert}, and stack the arrays: np.stack(images)")
    if shape[3] != 3:
        # One channel may be grey levels or the numbers of a palette's colours, which nothing here can tell apart.
        remedy = {
            1: f"repeat the grey channel: images.repeat(3, axis=-1); of a palette, {convert}",
            4: "drop alpha: images[..., :3]",
        }
        if shape[1] == 3:
            hint = "move the channels last: images.transpose(0, 2, 3, 1)"
        else:
            hint = remedy.get(shape[3], "the last axis must be R, G, B")
        raise ValueError(f"{wanted}, got {shape}; {hint}")
    if len(images) == 0:
        raise ValueError(f"the batch is empty, of shape {shape}: pass at least one image")
    if min(shape[1:3]) < MIN_SIDE:
        raise ValueError(f"{wanted} with sides of at least {MIN_SIDE} pixels, got {shape[1]} x {shape[2]}")
    if images.dtype != np.uint8:
        values = f" with values in [{images.min():.3g}, {images.max():.3g}]"
        if np.issubdtype(images.dtype, np.floating):
            hint = "for values in [0, 1] multiply by 255, clip to [0, 255] and cast: .astype(np.uint8)"
        else:
            hint = "rescale to [0, 255] and cast: .astype(np.uint8)"
        raise ValueError(f"{wanted}, got dtype {images.dtype}{values}; {hint}")


def check_count(scenes: Sequence[Any], count: int) -> None:
    """Raise ValueError unless there are `count` scenes."""
    if len(scenes) != count:
        raise ValueError(f"got {len(scenes)} scenes for {count} images; pass one scene an image")


def check_scenes(scenes: Sequence[HasWords], count: int) -> None:
    """Raise ValueError unless there are `count` scenes, each with target words and no blank one."""
    check_count(scenes, count)
    for index, scene in enumerate(scenes):
        words = getattr(scene, "words", None)
        if words is None or isinstance(words, str):
            raise ValueError(f"scene {index} ({scene!r:.80}) needs `.words`, a sequence of strings; got {words!r:.80}")
        if not words:
            raise ValueError(f"scene {index} has no target words; a text reward needs at least one")
        for word in words:
            if not isinstance(word, str) or not visible(word).strip():
                raise ValueError(f"target word {word!r} of scene {index} is not a non-blank string")
