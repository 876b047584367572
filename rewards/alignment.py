"""Text asked for against text read: which word stands for which, which letter for which, and where in the image.

Texts are compared as they are given: `text_metrics.normalize` them first.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

from rewards.components import Component
from rewards.ocr_engines import TextLine
from rewards.text_metrics import normalize


class ReadWord(NamedTuple):
    """A word that was read, and where."""

    text: str
    confidence: float  # in [0, 1], its line's
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


class Worth(NamedTuple):
    """What the parts of a text add to a score, in its units. A word's confidence multiplies `letter` and `word`."""

    letter: Sequence[float]  # (N,) of each letter of target w that is read right
    word: float  # of a target word that is read exactly
    spurious: float  # of each letter that was not asked for: 0 or less


# Words ---------------------------------------------------------------------------------------------------------------


def pair_words(asked: Sequence[str], read: Sequence[str]) -> list[list[int]]:
    """Of each word asked for, the indices in ascending order of the words read that stand for it; empty for none.

    The words are paired so that they are most alike in sum, whatever their order. A word read that is left over is part
    of a word that was split where it makes that one more alike; else it stands for the first word that has none.
    """
    parts: list[list[int]] = [[] for _ in asked]
    if asked and read:
        likeness = cdist(asked, read, scorer=Levenshtein.normalized_similarity)  # (asked, read)
        for target, index in zip(*linear_sum_assignment(likeness, maximize=True), strict=True):
            if likeness[target, index] > 0:
                parts[target].append(int(index))

    def distance(target: int, indices: Sequence[int]) -> int:
        return Levenshtein.distance(asked[target], "".join(read[i] for i in sorted(indices)))

    for index in sorted(set(range(len(read))) - {index for indices in parts for index in indices}):
        gains = [
            distance(target, indices) - distance(target, [*indices, index]) if indices else 0
            for target, indices in enumerate(parts)
        ]
        if gains and max(gains) > 0:
            parts[gains.index(max(gains))].append(index)
        elif [] in parts:
            parts[parts.index([])].append(index)
    return [sorted(indices) for indices in parts]


def counterparts(asked: Sequence[str], read: Sequence[str]) -> list[str | None]:
    """What was read in the place of each word asked for, see `pair_words`; None where nothing was."""
    return ["".join(read[i] for i in indices) if indices else None for indices in pair_words(asked, read)]


# Letters -------------------------------------------------------------------------------------------------------------


def pair_letters(word: str, shown: str) -> tuple[list[int | None], list[int]]:
    """For each letter of a word the index of the letter shown in its place, and the letters shown in place of none.

    By the fewest edits. A letter that is shown as another has a place, one that is left out has None.
    """
    at: list[int | None] = [None] * len(word)
    spurious: list[int] = []
    for edit in Levenshtein.opcodes(word, shown):
        span = range(edit.dest_start, edit.dest_end)
        if edit.tag in ("equal", "replace"):
            at[edit.src_start : edit.src_end] = span
        elif edit.tag == "insert":
            spurious += span
    return at, spurious


# Places --------------------------------------------------------------------------------------------------------------


def words_in(lines: Sequence[TextLine]) -> list[ReadWord]:
    """The words of an image's lines. Each has its share of the line's box, which is split evenly by characters."""
    return [
        ReadWord(match[0], line.confidence, share(line.box, match.start(), match.end(), len(line.text)))
        for line in lines
        for match in re.finditer(r"\S+", line.text)
    ]


def share(
    box: tuple[float, float, float, float], start: int, stop: int, count: int
) -> tuple[float, float, float, float]:
    """The box of characters `start` to `stop` of `count` of equal width, from left to right."""
    x0, y0, x1, y1 = box
    width = (x1 - x0) / count
    return x0 + start * width, y0, x0 + stop * width, y1


def text_components(targets: Sequence[str], read: Sequence[ReadWord], worth: Worth) -> list[Component]:
    """The parts of a text's score, with their places.

    - ("letter", w, k): letter k of target w, worth `worth.letter[w]` when it is read right and else 0. Its place is the
      letter that was read there, right or wrong; of a letter that is left out in a word that was found, the whole word,
      since any of its tokens may be to blame.
    - ("word", w): target w, worth `worth.word` when it is read exactly and in one piece; its place is the word. There
      is none where that is worth 0.
    - ("spurious", w, j): the j-th letter that was read in target w and not asked for, worth `worth.spurious` against
      the 0 of an image without it. Words that stand for no target count as target N.

    The words and letters of a target of which nothing was found have no place.

    Args:
        targets: the N words asked for.
        read: the words read.
        worth: see `Worth`.
    """
    wanted, shown = [normalize(word) for word in targets], [normalize(word.text) for word in read]
    pairs = pair_words(wanted, shown)
    found: list[Component] = []
    for w, (target, indices) in enumerate(zip(wanted, pairs, strict=True)):
        text = "".join(shown[i] for i in indices)
        letters = [box for i in indices for box in letter_boxes(shown[i], read[i])]
        confidence = min((read[i].confidence for i in indices), default=0.0)
        whole = np.array([read[i].box for i in indices], np.float32) if indices else None  # (n, 4)
        at, spurious = pair_letters(target, text)
        if worth.word:
            exact = shown[indices[0]] == target if len(indices) == 1 else False
            found.append(Component("word", (w,), worth.word * confidence if exact else 0.0, whole))
        for k, j in enumerate(at):
            right = j is not None and text[j] == target[k]
            place = whole if j is None else letters[j][None]
            found.append(Component("letter", (w, k), worth.letter[w] * confidence if right else 0.0, place))
        found += [Component("spurious", (w, j), worth.spurious, letters[i][None]) for j, i in enumerate(spurious)]
    left_over = sorted(set(range(len(read))) - {i for indices in pairs for i in indices})
    boxes = [box for i in left_over for box in letter_boxes(shown[i], read[i])]
    return found + [Component("spurious", (len(wanted), j), worth.spurious, box[None]) for j, box in enumerate(boxes)]


def letter_boxes(text: str, word: ReadWord) -> list[NDArray[np.float32]]:
    """The box (4,) of each letter of a word's normalised text, which splits the word's box evenly."""
    return [np.array(share(word.box, i, i + 1, len(text)), np.float32) for i in range(len(text))]
