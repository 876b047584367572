"""CVTG-2K's metrics: hand cases, and where they differ from rewards.text_metrics."""

from difflib import SequenceMatcher

import pytest

from rewards.cvtg import match_words, word_metrics
from rewards.text_metrics import normalized_edit_distance, word_accuracy


def test_hand_case():
    rows = match_words(["Coffee", "Bar"], ["COFFEE", "bat"])
    assert [read for read, _ in rows] == [True, False]
    assert [similarity for _, similarity in rows] == pytest.approx([1, 2 / 3], abs=1e-5)


def test_nothing_read():
    assert match_words(["GO"], []) == [(False, pytest.approx(0, abs=1e-5))]


def test_a_word_wanted_twice_need_be_read_once():
    assert word_metrics([["GO", "GO"]], [["GO"]])["word_accuracy"] == 1
    assert word_accuracy(["GO", "GO"], ["GO"]) == 0.5


def test_only_case_is_folded():
    assert word_metrics([["Today’s"]], [["TODAY'S"]])["word_accuracy"] == 0
    assert word_accuracy(["Today’s"], ["TODAY'S"]) == 1


def test_the_nearest_word_is_difflibs():
    target, reads = "KITE", ["AITE", "EKIT"]  # one exchange, and two edits; three letters in order in both
    assert {SequenceMatcher(None, read, target).ratio() for read in reads} == {0.75}
    assert match_words([target], reads) == [(False, pytest.approx(0.5, abs=1e-5))]
    assert normalized_edit_distance([target], reads) == pytest.approx(0.75, abs=1e-5)


def test_means_are_over_words_and_not_over_images():
    targets, reads = [["A"], ["B", "C", "D"]], [["A"], []]
    metrics = word_metrics(targets, reads)
    assert metrics["words"] == 4 and metrics["word_accuracy"] == pytest.approx(1 / 4)
    assert metrics["ned"] == pytest.approx(1 / 4, abs=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match="no target words"):
        word_metrics([], [])
    with pytest.raises(ValueError):
        word_metrics([["A"]], [])
