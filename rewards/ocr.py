"""The OCR reward of *VAR RL Done Right* (arXiv 2601.02256), section 4.2.1, eqs. 11-15.

`score_text` is the formula; `OCRReward` applies it to images. The functions below them are in `text_metrics`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, Reward, RewardOutput
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


class OCRReward(Reward):
    """Reads each image with OCR and scores the words against the scene's target words, eq. 15.

    Scores lie in [-penalty_weight, 2]: 2 when every word, and nothing else, is read with confidence 1, and
    -penalty_weight when nothing is read. A target with blanks in it counts as several words, as OCR reads it.

    Parts: completeness, similarity and penalty (eqs. 12-14), and for monitoring word_accuracy, ned and
    nothing_read (1 when OCR read no word, else 0).

    The models load on the first call and are shared by all rewards with the same engine settings, so that
    copies, pickles and many environments load them once a process.

    Args:
        engine: the name of an OCR engine, or an object with its `read` (see `ocr_engines.Engine`).
        penalty_weight: lambda of eq. 13.
        threads: how many images the engine reads at a time. Does not change the result.
    """

    name = "ocr"

    def __init__(self, engine: str | Engine = "rapidocr", penalty_weight: float = 0.6, threads: int = 2) -> None:
        if not 0.0 <= penalty_weight < float("inf"):
            raise ValueError(f"penalty_weight must be a finite number of at least 0, got {penalty_weight}")
        self.engine = get_engine(engine, threads) if isinstance(engine, str) else engine
        self.penalty_weight = penalty_weight

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        lines_of = self.engine.read(images)
        words = [[word for line in lines for word in line.text.split()] for lines in lines_of]
        # A word has its line's confidence: that is what the recogniser reports.
        confidences = [[line.confidence for line in lines for _ in line.text.split()] for lines in lines_of]
        rows = []
        for scene, read, confidence in zip(scenes, words, confidences, strict=True):
            targets = [word for text in scene.words for word in text.split()]
            row = asdict(score_text(targets, read, confidence, self.penalty_weight))
            row["word_accuracy"] = word_accuracy(targets, read)
            row["ned"] = normalized_edit_distance(targets, read)
            row["nothing_read"] = float(not read)
            rows.append(row)
        names = ("total", "completeness", "similarity", "penalty", "word_accuracy", "ned", "nothing_read")
        parts = {name: np.array([row[name] for row in rows], dtype=np.float32) for name in names}
        return RewardOutput(
            scores=parts.pop("total"),
            parts=parts,
            words=words,
            confidences=confidences,
            regions=[np.array([line.box for line in lines], np.float32).reshape(-1, 4) for lines in lines_of],
        )
