"""The OCR reward of *VAR RL Done Right* (arXiv 2601.02256), section 4.2.1, eqs. 11-15.

`score_text` is the formula, and `OCRReward` applies it to images. `TextReward` is the base of rewards that read images.
The string metrics are in `text_metrics`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.alignment import ReadWord, Worth, text_components, words_in
from rewards.base import HasWords, Reward, RewardOutput
from rewards.components import Component
from rewards.ocr_engines import Engine, get_engine
from rewards.text_metrics import (
    bag_distance,
    levenshtein_similarity,
    normalize,
    normalize_targets,
    normalized_edit_distance,
    word_accuracy,
)


@dataclass(frozen=True)
class TextScore:
    """The terms of eq. 15 for one image: `total = completeness + similarity - penalty`.

    completeness and similarity lie in [0, 1], penalty in [0, penalty_weight].
    """

    completeness: float
    similarity: float
    penalty: float
    total: float


def score_text(
    target_words: Sequence[str],
    read_words: Sequence[str],
    confidences: Sequence[float],
    penalty_weight: float = 0.6,
) -> TextScore:
    """The OCR reward of one image, eqs. 12-15. Words are compared after `text_metrics.normalize`.

    Args:
        target_words: G, the N words asked for; at least one. A word that occurs twice counts twice.
        read_words: P, the M words read; may be empty, and then the total is -penalty_weight.
        confidences: S, the confidence in [0, 1] of each word read.
        penalty_weight: lambda of eq. 13.

    Raises:
        ValueError: no target words, an empty one, a confidence too many or too few or outside [0, 1],
            or a negative penalty_weight.
    """
    _check(read_words, confidences, penalty_weight)
    targets = normalize_targets(target_words)
    reads = [normalize(word) for word in read_words]

    completeness = similarity = 0.0
    for target in targets:
        equal = [s for read, s in zip(reads, confidences, strict=True) if read == target]
        completeness += min(equal, default=0.0)  # eq. 12
        if reads:
            matches = [levenshtein_similarity(target, read) for read in reads]  # eq. 11
            best = matches.index(max(matches))  # the first in reading order, when several are equally near
            similarity += matches[best] * confidences[best]  # eq. 14
    completeness /= len(targets)
    similarity /= len(targets)

    wanted, found = "".join(targets), "".join(reads)
    penalty = penalty_weight * (bag_distance(found, wanted) / (len(found) + len(wanted)))  # eq. 13
    return TextScore(completeness, similarity, penalty, completeness + similarity - penalty)  # eq. 15


def _check(reads: Sequence[str], confidences: Sequence[float], penalty_weight: float) -> None:
    if isinstance(reads, str):
        raise ValueError(f"read_words must be a list of strings, got the string {reads!r}")
    if len(confidences) != len(reads):
        raise ValueError(f"got {len(confidences)} confidences for {len(reads)} words read; pass one a word")
    for word, confidence in zip(reads, confidences, strict=True):
        if not 0.0 <= confidence <= 1.0:
            raise ValueError(f"the confidence of {word!r} is {confidence}; confidences must lie in [0, 1]")
    if not 0.0 <= penalty_weight < float("inf"):
        raise ValueError(f"penalty_weight must be a finite number of at least 0, got {penalty_weight}")


class TextReward(Reward):
    """A reward of what OCR reads in an image. Subclasses set `name` and `terms` and implement `score_words`.

    A target with blanks in it counts as several words, as OCR reads it. A word has its line's confidence: that is
    what the recogniser reports.

    Its parts are the `terms`, and three for monitoring: word_accuracy, ned and nothing_read (1 when OCR read no word,
    else 0).

    The models load on the first call. All rewards with the same engine settings share them, so copies, pickles and
    many environments load them once in each process.

    Args:
        engine: the name of an OCR engine, or an object with its `read` (see `ocr_engines.Engine`).
        threads: how many images the engine reads at a time. Does not change the result.
        engine_kwargs: options of the engine that is named, such as `paddle_engine.PaddleOCREngine`'s.
    """

    terms: tuple[str, ...]  # names of the parts that `score_words` gives

    def __init__(
        self, engine: str | Engine = "rapidocr", threads: int = 2, engine_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if isinstance(engine, str):
            self.engine = get_engine(engine, threads, engine_kwargs)
        elif engine_kwargs:
            raise ValueError(f"engine_kwargs are for an engine given by its name, not for {engine!r}")
        else:
            self.engine = engine

    @abstractmethod
    def score_words(
        self, targets: Sequence[str], read: Sequence[str], confidences: Sequence[float]
    ) -> dict[str, float]:
        """One image's reward, under "total", and its `terms`, from the target words and the words read."""

    def worth(self, targets: Sequence[str], read: Sequence[ReadWord]) -> Worth | None:
        """What letters and words add to one image's reward. None, as here, for a reward that gives no components."""
        return None

    def components(self, targets: Sequence[str], read: Sequence[ReadWord]) -> list[Component]:
        """The parts of one image's reward, see `alignment.text_components`."""
        worth = self.worth(targets, read)
        return [] if worth is None else text_components(targets, read, worth)

    def describe(self) -> dict[str, str]:
        return self.engine.describe()

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        lines_of = self.engine.read(images)
        found = [words_in(lines) for lines in lines_of]
        words = [[word.text for word in read] for read in found]
        confidences = [[word.confidence for word in read] for read in found]
        rows, components = [], []
        for scene, placed, read, confidence in zip(scenes, found, words, confidences, strict=True):
            targets = [word for text in scene.words for word in text.split()]
            row = self.score_words(targets, read, confidence)
            row["word_accuracy"] = word_accuracy(targets, read)
            row["ned"] = normalized_edit_distance(targets, read)
            row["nothing_read"] = float(not read)
            rows.append(row)
            components.append(self.components(targets, placed))
        names = ("total", *self.terms, "word_accuracy", "ned", "nothing_read")
        parts = {name: np.array([row[name] for row in rows], dtype=np.float32) for name in names}
        return RewardOutput(
            scores=parts.pop("total"),
            parts=parts,
            words=words,
            confidences=confidences,
            regions=[np.array([line.box for line in lines], np.float32).reshape(-1, 4) for lines in lines_of],
            components=components,
        )


class OCRReward(TextReward):
    """Reads each image with OCR and scores the words against the scene's target words, eq. 15.

    Scores lie in [-penalty_weight, 2]: 2 when every word, and nothing else, is read with confidence 1, and
    -penalty_weight when nothing is read.

    Parts: completeness, similarity and penalty (eqs. 12-14), and those of `TextReward`.

    Components: words (eq. 12), letters (eq. 14) and spurious letters (eq. 13), see `alignment.text_components`. They
    add up to the score of a right text; of others they leave out that eq. 13 also charges for letters that are missing,
    and that eq. 11 divides by the longer of two words.

    Args:
        engine, threads, engine_kwargs: see `TextReward`.
        penalty_weight: lambda of eq. 13.
    """

    name = "ocr"
    terms = ("completeness", "similarity", "penalty")

    def __init__(
        self,
        engine: str | Engine = "rapidocr",
        penalty_weight: float = 0.6,
        threads: int = 2,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0.0 <= penalty_weight < float("inf"):
            raise ValueError(f"penalty_weight must be a finite number of at least 0, got {penalty_weight}")
        super().__init__(engine, threads, engine_kwargs)
        self.penalty_weight, self.score_range = penalty_weight, (-penalty_weight, 2.0)

    def score_words(
        self, targets: Sequence[str], read: Sequence[str], confidences: Sequence[float]
    ) -> dict[str, float]:
        return asdict(score_text(targets, read, confidences, self.penalty_weight))

    def worth(self, targets: Sequence[str], read: Sequence[ReadWord]) -> Worth:
        lengths, shown = [len(normalize(word)) for word in targets], sum(len(normalize(word.text)) for word in read)
        n = len(targets)
        return Worth(
            letter=[1 / (n * length) for length in lengths],  # eqs. 11 and 14, where nothing is left over
            word=1 / n,  # eq. 12
            spurious=-self.penalty_weight / (sum(lengths) + shown),  # eq. 13
        )
