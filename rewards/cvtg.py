"""The metrics of CVTG-2K (arXiv 2503.23461), as the benchmark's own program computes them.

The program is ``unified_metrics_eval.py`` in ``TextCrafter_Eval`` of https://github.com/NJU-PCALab/TextCrafter. Next to
`text_metrics`, whose word accuracy and NED belong to one image and are averaged over images:

- A mean is over all target words of all images, so that an image with many words weighs more.
- A target counts as read when it is anywhere among the words read: a word that is wanted twice need be read once. Of
  the 2,000 prompts 135 have such a word.
- Words are compared in lower case and otherwise as they are: quotes and dashes are not folded.
- NED compares a target with the read word that Python's ``difflib`` finds nearest, which need not be the nearest in
  edits.
- CLIPScore is that of CLIP ViT-L/14, with `CLIP_PREFIX` before the prompt, and a mean over images.

The program reads with PaddleOCR 2 (``lang="en"``, ``use_angle_cls=True``), and the authors' images have 1024 pixels:
numbers beside those of their tables need both, and that CLIP.
"""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np

from rewards.text_metrics import levenshtein_similarity

CLIP_PREFIX = "A photo depicts "
EPS = 1e-5  # of the program's normalised Levenshtein similarity


def match_words(targets: Sequence[str], reads: Sequence[str]) -> list[tuple[bool, float]]:
    """For each of one image's target words: whether it was read, and its similarity in [0, 1] to the word it matches.

    Args:
        targets: the words asked for, without white space.
        reads: the words read, in reading order; may be empty.
    """
    read = [word.lower() for word in reads] or [""]
    rows = []
    for target in (word.lower() for word in targets):
        (nearest,) = get_close_matches(target, read, n=1, cutoff=0)
        rows.append((target in read, levenshtein_similarity(target, nearest, EPS)))
    return rows


def word_metrics(targets: Sequence[Sequence[str]], reads: Sequence[Sequence[str]]) -> dict[str, float]:
    """``words``, the number of target words of some images, with their ``word_accuracy`` and ``ned``, both in [0, 1].

    Args:
        targets, reads: of each image, as `match_words` takes them; the images need one target or more in all.
    """
    rows = [row for image in zip(targets, reads, strict=True) for row in match_words(*image)]
    if not rows:
        raise ValueError("there are no target words: give one image with one word, or more")
    accuracy, ned = np.mean(rows, axis=0)
    return {"words": len(rows), "word_accuracy": float(accuracy), "ned": float(ned)}
