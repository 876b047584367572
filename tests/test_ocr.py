"""The OCR reward: eqs. 12-15 by hand and by loops, and `OCRReward` on an engine that reads as it is told."""

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest

from rewards.ocr import OCRReward, score_text
from rewards.ocr_engines import TextLine

IMAGES = np.zeros((2, 64, 64, 3), np.uint8)


class Recital:
    """An engine that returns the lines that it was given."""

    def __init__(self, *lines_of):
        self.lines_of = list(lines_of)

    def read(self, images):
        return self.lines_of[: len(images)]


def scene(*words):
    return SimpleNamespace(words=words)


# --- score_text


def test_a_perfect_reading_scores_two():
    score = score_text(["KITE", "RUN"], ["kite", "run"], [1.0, 1.0])
    assert (score.completeness, score.similarity, score.penalty, score.total) == (1.0, 1.0, 0.0, 2.0)


def test_nothing_read_scores_minus_the_penalty_weight():
    score = score_text(["KITE", "RUN"], [], [])
    assert (score.completeness, score.similarity, score.penalty, score.total) == (0.0, 0.0, 0.6, -0.6)
    assert score_text(["KITE"], [], [], penalty_weight=0.25).total == -0.25


def test_a_case_by_hand():
    score = score_text(["KITE", "RUN"], ["KITS", "RUN"], [0.8, 0.5])
    assert score.completeness == pytest.approx((0 + 0.5) / 2)
    assert score.similarity == pytest.approx((0.75 * 0.8 + 1 * 0.5) / 2)
    assert score.penalty == pytest.approx(0.6 * 2 / 14)  # E and S are unmatched
    assert score.total == pytest.approx(0.25 + 0.55 - 0.6 * 2 / 14)


def test_completeness_takes_the_least_confidence_among_equal_reads():
    score = score_text(["RUN"], ["RUN", "RUN"], [0.9, 0.4])
    assert score.completeness == pytest.approx(0.4)
    assert score.similarity == pytest.approx(0.9)  # the first of the best matches
    assert score.penalty == pytest.approx(0.6 * 3 / 9)


def test_a_target_that_occurs_twice_counts_twice():
    score = score_text(["RUN", "RUN"], ["RUN"], [0.8])
    assert score.completeness == pytest.approx(0.8)
    assert score.similarity == pytest.approx(0.8)
    assert score.penalty == pytest.approx(0.6 * 3 / 9)


def test_the_penalty_sees_characters_and_neither_words_nor_order():
    assert score_text(["KITE", "RUN"], ["NURETIK"], [1.0]).penalty == 0.0
    assert score_text(["AB"], ["XYZ"], [1.0]).penalty == pytest.approx(0.6)


def test_words_are_compared_after_normalisation():
    assert score_text(["IT’S", "ﬁn"], ["it's", "FIN"], [1.0, 1.0]).total == 2.0


def naive_score(targets, reads, confidences, weight):
    """Eqs. 11-15 in loops, for words that are normal already."""

    def distance(x, y):
        if not x or not y:
            return len(x) + len(y)
        return min(distance(x[1:], y) + 1, distance(x, y[1:]) + 1, distance(x[1:], y[1:]) + (x[0] != y[0]))

    completeness = similarity = 0.0
    for target in targets:
        least, best, best_confidence = None, -1.0, 0.0
        for read, confidence in zip(reads, confidences, strict=True):
            if read == target:
                least = confidence if least is None else min(least, confidence)
            near = 1 - distance(target, read) / (max(len(target), len(read)) + 1e-8)
            if near > best:
                best, best_confidence = near, confidence
        completeness += least or 0.0
        similarity += max(best, 0.0) * best_confidence
    found, wanted = "".join(reads), "".join(targets)
    bag = sum(abs(found.count(c) - wanted.count(c)) for c in set(found + wanted))
    penalty = weight * bag / (len(found) + len(wanted))
    completeness, similarity = completeness / len(targets), similarity / len(targets)
    return completeness, similarity, penalty, completeness + similarity - penalty


def test_score_text_against_loops():
    rng = random.Random(0)

    def words(at_least):
        return ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(rng.randint(at_least, 3))]

    for _ in range(300):
        targets, reads = words(1), words(0)
        confidences = [rng.random() for _ in reads]
        weight = rng.choice([0.0, 0.6, 1.0])
        score = score_text(targets, reads, confidences, weight)
        expected = naive_score(targets, reads, confidences, weight)
        result = (score.completeness, score.similarity, score.penalty, score.total)
        assert result == pytest.approx(expected, abs=1e-12)
        assert 0.0 <= score.completeness <= 1.0
        assert 0.0 <= score.similarity <= 1.0
        assert 0.0 <= score.penalty <= weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["RUN"], [1.0]), r"target words must be a list .*got \[\]"),
        ((["RUN", ""], ["RUN"], [1.0]), "target words must be a list"),
        (("RUN", ["RUN"], [1.0]), "got 'RUN'"),
        ((["RUN"], "RUN", [1.0] * 3), "read_words must be a list of strings, got the string 'RUN'"),
        ((["RUN"], ["RUN"], []), "got 0 confidences for 1 words read"),
        ((["RUN"], ["RUN"], [1.5]), "the confidence of 'RUN' is 1.5"),
        ((["RUN"], ["RUN"], [float("nan")]), "the confidence of 'RUN' is nan"),
        ((["RUN"], ["RUN"], [1.0], -0.1), "penalty_weight must be .* at least 0, got -0.1"),
        ((["RUN"], ["RUN"], [1.0], float("nan")), "penalty_weight must be .* got nan"),
    ],
)
def test_score_text_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_text(*arguments)


# --- OCRReward


def test_the_output_of_the_reward():
    engine = Recital(
        [TextLine("KITE FAR", 0.9, (1, 2, 30, 20)), TextLine("RUN", 0.7, (3, 30, 40, 60))],
        [],
    )
    output = OCRReward(engine)(IMAGES, [scene("KITE", "RUN"), scene("SUN")])

    assert output.words == [["KITE", "FAR", "RUN"], []]
    assert output.confidences == [[0.9, 0.9, 0.7], []]  # a word has its line's confidence
    np.testing.assert_array_equal(output.regions[0], [[1, 2, 30, 20], [3, 30, 40, 60]])
    assert output.regions[1].shape == (0, 4)
    assert all(region.dtype == np.float32 for region in output.regions)

    first = score_text(["KITE", "RUN"], ["KITE", "FAR", "RUN"], [0.9, 0.9, 0.7])
    np.testing.assert_allclose(output.scores, [first.total, -0.6], rtol=1e-6)
    assert set(output.parts) == {
        "completeness",
        "similarity",
        "penalty",
        "word_accuracy",
        "ned",
        "nothing_read",
    }
    assert all(part.dtype == np.float32 and part.shape == (2,) for part in output.parts.values())
    np.testing.assert_allclose(output.parts["completeness"], [0.8, 0.0], rtol=1e-6)
    np.testing.assert_allclose(output.parts["penalty"], [0.6 * 3 / 17, 0.6], rtol=1e-6)
    np.testing.assert_array_equal(output.parts["word_accuracy"], [1, 0])
    np.testing.assert_array_equal(output.parts["ned"], [1, 0])
    np.testing.assert_array_equal(output.parts["nothing_read"], [0, 1])
    sums = output.parts["completeness"] + output.parts["similarity"] - output.parts["penalty"]
    np.testing.assert_allclose(output.scores, sums, rtol=1e-6)


def test_components_of_a_right_text_add_up_to_the_score():
    engine = Recital([TextLine("KITE RUN", 0.9, (0, 0, 80, 20))])
    output = OCRReward(engine)(IMAGES[:1], [scene("KITE", "RUN")])
    assert sum(part.value for part in output.components[0]) == pytest.approx(output.scores[0]) == 1.8


def test_components_say_where_the_score_came_from():
    engine = Recital([TextLine("KITS UP", 0.5, (0, 0, 70, 20))], [])
    output = OCRReward(engine)(IMAGES, [scene("KITE", "RUN")] * 2)
    parts = {(part.kind, *part.indices): part for part in output.components[0]}
    np.testing.assert_array_equal(parts["letter", 0, 3].boxes, [[30, 0, 40, 20]])
    assert parts["letter", 0, 3].value == 0.0 and parts["letter", 0, 0].value == 0.5 / 8
    assert parts["word", 0].value == 0.0
    for part in output.components[1]:
        assert part.value == 0 and part.boxes is None


def test_spurious_letters_are_charged_as_in_eq_13():
    engine = Recital([TextLine("KITE UP", 1.0, (0, 0, 70, 20))])
    output = OCRReward(engine)(IMAGES[:1], [scene("KITE")])
    assert sum(part.value for part in output.components[0]) == pytest.approx(output.scores[0]) == 2 - 0.6 * 2 / 10


def test_a_target_with_a_blank_counts_as_two_words():
    engine = Recital([TextLine("NEW YORK", 1.0, (0, 0, 1, 1))])
    assert OCRReward(engine)(IMAGES[:1], [scene("NEW YORK")]).scores == 2.0


def test_the_penalty_weight_is_an_option():
    assert OCRReward(Recital([]), penalty_weight=0.25)(IMAGES[:1], [scene("RUN")]).scores == -0.25
    with pytest.raises(ValueError, match=r"penalty_weight must be .* got -1"):
        OCRReward(penalty_weight=-1)


def test_no_target_words_is_an_error():
    with pytest.raises(ValueError, match="scene 1 has no target words"):
        OCRReward(Recital([], []))(IMAGES, [scene("RUN"), scene()])


def test_copies_and_pickles_share_the_engine():
    reward = OCRReward()
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward)), OCRReward(penalty_weight=0.1)):
        assert twin.engine is reward.engine
    assert OCRReward(threads=1).engine is not reward.engine
