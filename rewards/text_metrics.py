"""Text metrics as pure functions: eq. 11, the distance inside eq. 13, and the metrics of the paper's tables.

Equation numbers refer to *VAR RL Done Right* (arXiv 2601.02256), section 4.2.1.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from rewards.invisible import visible

_SINGLE_QUOTES = "\u2018\u2019\u201a\u201b\u2032\u2035\u00b4\u0060\u02b9\u02bb\u02bc\u02bd\u2039\u203a"
_DOUBLE_QUOTES = "\u201c\u201d\u201e\u201f\u2033\u2036\u02ba\u00ab\u00bb\u301d\u301e\u301f"
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u2e3a\u2e3b\ufe31\ufe32\ufe58\ufe63\uff0d"
_FOLD = str.maketrans(
    dict.fromkeys(_SINGLE_QUOTES, "'") | dict.fromkeys(_DOUBLE_QUOTES, '"') | dict.fromkeys(_DASHES, "-")
)


def normalize(text: str) -> str:
    """The form in which texts are compared: quotes and dashes folded to ASCII, NFKC, casefold. Idempotent.

    Characters that nobody sees, such as zero-width spaces and soft hyphens, are left out.
    """
    # Folded first, because NFKC would turn an acute accent used as an apostrophe into a space and a mark.
    folded = unicodedata.normalize("NFKC", visible(text).translate(_FOLD)).translate(_FOLD)
    return unicodedata.normalize("NFKC", folded.casefold())


def normalize_targets(targets: Sequence[str]) -> list[str]:
    """The target words after `normalize`. ValueError when there are none, or an empty one."""
    if isinstance(targets, str) or not targets or not all(map(visible, targets)):
        raise ValueError(f"target words must be a list of one or more strings that show something, got {targets!r}")
    return [normalize(word) for word in targets]


def levenshtein_similarity(x: str, y: str, eps: float = 1e-8) -> float:
    """LD(x, y), eq. 11: one minus the edit distance over the longer length. Of the strings as they are given.

    In [0, 1]; 1 for equal strings, two empty ones included, and about eps for strings with nothing in common.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return 1.0 - Levenshtein.distance(x, y) / (max(len(x), len(y)) + eps)


def bag_distance(x: str, y: str) -> int:
    """BagDist of eq. 13: the size of the symmetric multiset difference of the characters of x and y.

    In [0, len(x) + len(y)], so that the penalty of eq. 13 lies in [0, lambda].
    """
    in_x, in_y = Counter(x), Counter(y)
    return (in_x - in_y).total() + (in_y - in_x).total()


def word_accuracy(targets: Sequence[str], reads: Sequence[str]) -> float:
    """The fraction of one image's target words that were read exactly, after `normalize`. In [0, 1].

    A multiset match: a word that occurs twice in the targets must be read twice. Excess reads cost nothing.
    ValueError when there are no targets.
    """
    wanted, read = Counter(normalize_targets(targets)), Counter(map(normalize, reads))
    return (wanted & read).total() / wanted.total()


def normalized_edit_distance(targets: Sequence[str], reads: Sequence[str]) -> float:
    """NED of one image: the mean over the targets of the best LD among the words read, after `normalize`.

    Higher is better, as in the paper's tables. In [0, 1]; 0 when nothing was read. ValueError when there are
    no targets.
    """
    words, read = normalize_targets(targets), [normalize(word) for word in reads]
    best = [max((levenshtein_similarity(word, other) for other in read), default=0.0) for word in words]
    return sum(best) / len(words)
