"""Words and letters asked for against those read: by hand, and against a naive alignment."""

import random

import numpy as np
import pytest

from rewards.alignment import (
    ReadWord,
    Worth,
    counterparts,
    pair_letters,
    pair_words,
    share,
    text_components,
    words_in,
)
from rewards.ocr_engines import TextLine


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (["elk", "run"], ["elk", "run"]),
        (["run", "elk"], ["elk", "run"]),  # whatever the order
        (["run"], [None, "run"]),
        (["elx"], ["elx", None]),
        (["el", "k", "run"], ["elk", "run"]),  # a word that was split
        (["elk", "zzz"], ["elk", "zzz"]),  # something stands there
        (["elk", "run", "zzz"], ["elk", "run"]),
        ([], [None, None]),
    ],
)
def test_counterparts(read, expected):
    assert counterparts(["elk", "run"], read) == expected


def test_pairs_are_indices_in_reading_order():
    assert pair_words(["elk", "run"], ["run", "el", "k"]) == [[1, 2], [0]]
    assert pair_words(["elk"], []) == [[]] and pair_words([], ["elk"]) == []


def edits(x, y):
    """Levenshtein's distance by its definition."""
    if not x or not y:
        return len(x) + len(y)
    return min(edits(x[1:], y) + 1, edits(x, y[1:]) + 1, edits(x[1:], y[1:]) + (x[0] != y[0]))


def test_letters_by_hand():
    assert pair_letters("kite", "kite") == ([0, 1, 2, 3], [])
    assert pair_letters("kite", "kxte") == ([0, 1, 2, 3], [])
    assert pair_letters("kite", "kte") == ([0, None, 1, 2], [])
    assert pair_letters("kite", "kitte") in (([0, 1, 2, 4], [3]), ([0, 1, 3, 4], [2]))
    assert pair_letters("kite", "") == ([None] * 4, []) and pair_letters("", "ab") == ([], [0, 1])


def test_letters_are_paired_in_order_and_by_the_fewest_edits():
    rng = random.Random(0)
    for _ in range(200):
        word, shown = ("".join(rng.choices("abc", k=rng.randint(0, 4))) for _ in range(2))
        at, spurious = pair_letters(word, shown)
        placed = [j for j in at if j is not None]
        assert sorted(placed + spurious) == list(range(len(shown))) and placed == sorted(placed)
        wrong = sum(j is None or shown[j] != letter for letter, j in zip(word, at, strict=True))
        assert wrong + len(spurious) == edits(word, shown)


def test_words_have_their_share_of_the_line():
    lines = [TextLine("AB  CDE", 0.5, (0, 10, 70, 20)), TextLine("X", 1.0, (5, 30, 15, 40))]
    assert words_in(lines) == [
        ReadWord("AB", 0.5, (0, 10, 20, 20)),
        ReadWord("CDE", 0.5, (40, 10, 70, 20)),
        ReadWord("X", 1.0, (5, 30, 15, 40)),
    ]
    assert share((10, 0, 20, 1), 1, 3, 4) == (12.5, 0, 17.5, 1)


def found(targets, *read, word=0.0):
    """The components by kind and indices."""
    worth = Worth([1.0] * len(targets), word, -0.1)
    return {(part.kind, *part.indices): part for part in text_components(targets, read, worth)}


class TestComponents:
    def test_by_hand(self):
        parts = found(["KITE", "RUN", "SUN"], ReadWord("kats", 0.5, (0, 0, 40, 8)), ReadWord("RUNN", 1, (0, 8, 40, 16)))
        letters = {key[1:]: part for key, part in parts.items() if key[0] == "letter"}
        assert [letters[0, k].value for k in range(4)] == [0.5, 0, 0.5, 0]  # the word's confidence
        for k in range(4):  # a wrong letter has a place
            np.testing.assert_array_equal(letters[0, k].boxes, [[10 * k, 0, 10 * k + 10, 8]])
        assert [letters[1, k].value for k in range(3)] == [1, 1, 1]
        assert [(letters[2, k].value, letters[2, k].boxes) for k in range(3)] == [(0, None)] * 3  # nothing was found
        assert [key for key in parts if key[0] == "spurious"] == [("spurious", 1, 0)]
        assert parts["spurious", 1, 0].value == -0.1 and parts["spurious", 1, 0].boxes[0, 0] in (20, 30)  # either N

    def test_a_letter_left_out_is_somewhere_in_its_word(self):
        parts = found(["KITE"], ReadWord("kte", 1.0, (0, 0, 30, 8)))
        np.testing.assert_array_equal(parts["letter", 0, 1].boxes, [[0, 0, 30, 8]])
        np.testing.assert_array_equal(parts["letter", 0, 3].boxes, [[20, 0, 30, 8]])

    def test_a_word_in_two_pieces(self):
        parts = found(["KITE"], ReadWord("ki", 0.9, (0, 0, 20, 8)), ReadWord("te", 0.4, (30, 0, 50, 8)), word=1.0)
        assert [parts["letter", 0, k].value for k in range(4)] == [0.4] * 4  # the less sure one
        np.testing.assert_array_equal(parts["letter", 0, 2].boxes, [[30, 0, 40, 8]])
        assert parts["word", 0].value == 0 and len(parts["word", 0].boxes) == 2

    def test_words_count_when_they_are_exact(self):
        parts = found(["KITE", "RUN"], ReadWord("KITE", 0.9, (0, 0, 40, 8)), word=0.5)
        assert parts["word", 0].value == 0.45 and (parts["word", 1].value, parts["word", 1].boxes) == (0, None)

    def test_words_that_stand_for_no_target(self):
        parts = found(["KITE"], ReadWord("KITE", 1, (0, 0, 40, 8)), ReadWord("up", 1, (0, 8, 20, 16)))
        assert {key for key in parts if key[0] == "spurious"} == {("spurious", 1, 0), ("spurious", 1, 1)}
        np.testing.assert_array_equal(parts["spurious", 1, 1].boxes, [[10, 8, 20, 16]])

    def test_letters_are_those_of_the_normalised_text(self):
        parts = found(["FIN"], ReadWord("\ufb01n", 1.0, (0, 0, 30, 8)))  # a ligature is two letters
        assert [parts["letter", 0, k].value for k in range(3)] == [1, 1, 1]
        np.testing.assert_array_equal(parts["letter", 0, 1].boxes, [[10, 0, 20, 8]])

    def test_nothing_read(self):
        assert {(part.value, part.boxes) for part in found(["KITE"], word=1.0).values()} == {(0, None)}
