"""Eq. 11, the bag distance and the paper's metrics, against hand cases and naive references."""

import random
import sys

import pytest

from rewards.text_metrics import (
    bag_distance,
    levenshtein_similarity,
    normalize,
    normalized_edit_distance,
    word_accuracy,
)


def naive_edit_distance(x: str, y: str) -> int:
    """The recurrence as it stands in textbooks."""
    row = list(range(len(y) + 1))
    for i, a in enumerate(x, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(y, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def naive_bag_distance(x: str, y: str) -> int:
    """Strike out equal characters in pairs and count what is left."""
    rest = list(y)
    unmatched = 0
    for character in x:
        if character in rest:
            rest.remove(character)
        else:
            unmatched += 1
    return unmatched + len(rest)


def random_words(rng: random.Random, count: int, alphabet: str = "abc", longest: int = 5) -> list[str]:
    return ["".join(rng.choices(alphabet, k=rng.randint(0, longest))) for _ in range(count)]


# --- normalize


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("KITE", "kite"),
        ("Straße", "strasse"),
        ("ΣΊΣΥΦΟΣ", "σίσυφοσ"),
        ("ＡＢ１", "ab1"),  # full-width forms
        ("ﬁn", "fin"),  # a ligature
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),  # composed and decomposed accents
        ("‘it’s’ “so”", "'it's' \"so\""),
        ("don´t", "don't"),
        ("a–b—c−d‑e", "a-b-c-d-e"),
        ("5″ 6′", "5\" 6'"),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


def test_normalize_is_idempotent_and_folds_every_form_of_a_quote_or_dash():
    typographic = set("‘’‚‛“”„‟′‵´«»‹›‐‑‒–—―−")
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000:
            continue
        once = normalize(chr(code))
        assert once == chr(code) or normalize(once) == once, hex(code)
        assert typographic.isdisjoint(once), hex(code)


# --- levenshtein_similarity, eq. 11


def test_levenshtein_similarity_by_hand():
    assert levenshtein_similarity("kitten", "sitting", eps=1.0) == 1 - 3 / 8
    assert levenshtein_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert levenshtein_similarity("run", "run") == 1.0
    assert levenshtein_similarity("", "") == 1.0
    assert levenshtein_similarity("run", "") == pytest.approx(0.0, abs=1e-6)
    assert levenshtein_similarity("abc", "xyz") == pytest.approx(0.0, abs=1e-6)


def test_levenshtein_similarity_compares_the_strings_as_given_by_code_point():
    assert levenshtein_similarity("A", "a") == pytest.approx(0.0, abs=1e-6)
    assert levenshtein_similarity("né", "ne") == pytest.approx(0.5)
    assert levenshtein_similarity("a😀", "a") == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_levenshtein_similarity_against_the_naive_recurrence(seed):
    words = random_words(random.Random(seed), 40)
    for x in words:
        for y in words:
            expected = 1 - naive_edit_distance(x, y) / (max(len(x), len(y)) + 1e-3)
            assert levenshtein_similarity(x, y, eps=1e-3) == pytest.approx(expected, abs=1e-12)
            assert 0.0 <= levenshtein_similarity(x, y) <= 1.0


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_levenshtein_similarity_wants_a_positive_eps(eps):
    with pytest.raises(ValueError, match="eps must be positive"):
        levenshtein_similarity("a", "b", eps=eps)


# --- bag_distance, in eq. 13


@pytest.mark.parametrize(
    ("x", "y", "distance"),
    [("", "", 0), ("abc", "cab", 0), ("aab", "abc", 2), ("aaa", "a", 2), ("abc", "", 3), ("abc", "xyz", 6)],
)
def test_bag_distance_by_hand(x, y, distance):
    assert bag_distance(x, y) == distance
    assert bag_distance(y, x) == distance


def test_bag_distance_against_striking_out():
    words = random_words(random.Random(0), 60, longest=8)
    for x in words:
        for y in words:
            assert bag_distance(x, y) == naive_bag_distance(x, y)


# --- word_accuracy


@pytest.mark.parametrize(
    ("targets", "reads", "accuracy"),
    [
        (["KITE", "RUN"], ["run", "kite"], 1.0),
        (["KITE", "RUN"], ["RUN", "KIT"], 0.5),
        (["RUN", "RUN"], ["RUN"], 0.5),
        (["RUN", "RUN"], ["RUN", "RUN", "RUN"], 1.0),
        (["RUN"], ["RUN", "FAR", "OFF"], 1.0),
        (["IT’S"], ["it's"], 1.0),
        (["KITE"], [], 0.0),
    ],
)
def test_word_accuracy(targets, reads, accuracy):
    assert word_accuracy(targets, reads) == accuracy


# --- normalized_edit_distance


def test_normalized_edit_distance_by_hand():
    assert normalized_edit_distance(["KITE", "RUN"], ["run", "KITS"]) == pytest.approx((0.75 + 1) / 2)
    assert normalized_edit_distance(["RUN", "RUN"], ["RUN"]) == 1.0  # one read may be the best match of both
    assert normalized_edit_distance(["KITE"], []) == 0.0


def test_normalized_edit_distance_against_loops():
    rng = random.Random(0)
    for _ in range(200):
        targets = [word + "x" for word in random_words(rng, rng.randint(1, 3))]
        reads = random_words(rng, rng.randint(0, 3))
        total = 0.0
        for target in targets:
            best = 0.0
            for read in reads:
                best = max(best, 1 - naive_edit_distance(target, read) / max(len(target), len(read)))
            total += best
        result = normalized_edit_distance(targets, reads)
        assert result == pytest.approx(total / len(targets), abs=1e-6)
        assert 0.0 <= result <= 1.0


@pytest.mark.parametrize("metric", [word_accuracy, normalized_edit_distance])
@pytest.mark.parametrize("targets", [[], ["RUN", ""], "RUN"])
def test_metrics_want_target_words(metric, targets):
    with pytest.raises(ValueError, match="target words must be a list"):
        metric(targets, ["RUN"])
