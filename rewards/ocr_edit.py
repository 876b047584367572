"""The OCR reward of Flow-GRPO (arXiv 2505.05470) and STAGE (its appendix B.1, item 3): one minus the edit distance.

`edit_counts` is the distance; `OCREditReward` applies it to images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rapidfuzz.distance import Levenshtein

from rewards.alignment import ReadWord, Worth
from rewards.components import Component
from rewards.ocr import TextReward
from rewards.ocr_engines import Engine
from rewards.text_metrics import normalize, normalize_targets

VARIANTS = ("paper", "flow_grpo")


def edit_counts(target_words: Sequence[str], read_words: Sequence[str], variant: str = "paper") -> tuple[int, int]:
    """N_e and N_ref of one image: the edit distance from the text read to the target, and the target's length.

    Both texts are compared after `text_metrics.normalize`, joined in order and without blanks.

    Args:
        target_words: the words asked for, in order; at least one.
        read_words: the words read, in reading order; may be empty, and then N_e is N_ref.
        variant: "paper" counts every edit. "flow_grpo" counts none when the target occurs within the text read, as
            Flow-GRPO's public program does: what is written beside the target is then free.

    Raises:
        ValueError: no target words, an empty one, or an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; available: {', '.join(VARIANTS)}")
    if isinstance(read_words, str):
        raise ValueError(f"read_words must be a list of strings, got the string {read_words!r}")
    target = _join(normalize_targets(target_words))
    read = _join([normalize(word) for word in read_words])
    if not target:
        raise ValueError(f"the target words {list(target_words)!r} are blank; the reward needs at least one character")
    if variant == "flow_grpo" and target in read:
        return 0, len(target)
    return Levenshtein.distance(read, target), len(target)


def _join(words: Sequence[str]) -> str:
    return "".join("".join(words).split())


class OCREditReward(TextReward):
    """Reads each image with OCR and scores the text against the target text: ``max(1 - N_e / N_ref, 0)``.

    N_e is the edit distance between the text read and the target text, N_ref the target's number of characters: see
    `edit_counts`. Scores lie in [0, 1]: 1 when the target words, and nothing else, are read in their order, and 0 when
    nothing is read. The recogniser's confidences don't matter. Characters beside the target cost an edit each, so that
    enough of them bring the score to 0.

    Flow-GRPO's program scores the first quotation of a prompt; here the target is all of the scene's words.

    Parts: edit_distance (N_e), and those of `TextReward`.

    Components: letters and spurious letters, an edit each, see `alignment.text_components`. They add up to the score
    where the words are read in their order and N_e is at most N_ref.

    Args:
        engine, threads, engine_kwargs: see `TextReward`.
        variant: "paper", or "flow_grpo" for the public program's rule; see `edit_counts`.
    """

    name = "ocr_edit"
    score_range = (0.0, 1.0)
    terms = ("edit_distance",)

    def __init__(
        self,
        engine: str | Engine = "rapidocr",
        variant: str = "paper",
        threads: int = 2,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; available: {', '.join(VARIANTS)}")
        super().__init__(engine, threads, engine_kwargs)
        self.variant = variant

    def score_words(
        self, targets: Sequence[str], read: Sequence[str], confidences: Sequence[float]
    ) -> dict[str, float]:
        edits, length = edit_counts(targets, read, self.variant)
        return {"total": max(1 - edits / length, 0.0), "edit_distance": edits}

    def components(self, targets: Sequence[str], read: Sequence[ReadWord]) -> list[Component]:
        return super().components(targets, [word._replace(confidence=1.0) for word in read])

    def worth(self, targets: Sequence[str], read: Sequence[ReadWord]) -> Worth:
        each = 1 / len(_join([normalize(word) for word in targets]))
        return Worth([each] * len(targets), word=0.0, spurious=-each)
