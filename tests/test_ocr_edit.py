"""The OCR reward of STAGE and Flow-GRPO: the formula by hand and by loops, and `OCREditReward` as a reward."""

import random

import gymnasium as gym
import numpy as np
import pytest
from test_ocr import IMAGES, Recital, scene

import rewards
import var_env  # noqa: F401  registers VARText-v0
from rewards.ocr_edit import OCREditReward, edit_counts
from rewards.ocr_engines import TextLine, get_engine


@pytest.mark.parametrize(
    ("targets", "reads", "expected"),
    [
        (["KITE", "RUN"], ["KITE", "RUN"], (0, 7)),
        (["KITE", "RUN"], ["kiterun"], (0, 7)),  # neither case nor the breaks between words count
        (["KITE", "RUN"], ["KITS", "RUN"], (1, 7)),  # one substitution
        (["KITE", "RUN"], ["KITE"], (3, 7)),  # three deletions
        (["KITE", "RUN"], ["RUN", "KITE"], (6, 7)),  # in the wrong order
        (["KITE", "RUN"], [], (7, 7)),
        (["RUN"], ["RUNNING", "RUN"], (7, 3)),
        (["NEW YORK"], ["NEW", "YORK"], (0, 7)),
        (["IT’S"], ["it's"], (0, 4)),
    ],
)
def test_cases_by_hand(targets, reads, expected):
    assert edit_counts(targets, reads) == expected


def test_flow_grpos_program_forgives_what_is_beside_the_target():
    assert edit_counts(["RUN"], ["OVER", "RUNNING"], "paper") == (8, 3)
    assert edit_counts(["RUN"], ["OVER", "RUNNING"], "flow_grpo") == (0, 3)
    assert edit_counts(["KITE", "RUN"], ["A", "KITE", "RUN"], "flow_grpo") == (0, 7)
    assert edit_counts(["KITE", "RUN"], ["KITE", "A", "RUN"], "flow_grpo") == (1, 7)  # not in one piece


def test_the_distance_against_loops():
    def distance(x, y):
        if not x or not y:
            return len(x) + len(y)
        return min(distance(x[1:], y) + 1, distance(x, y[1:]) + 1, distance(x[1:], y[1:]) + (x[0] != y[0]))

    rng = random.Random(0)
    for _ in range(200):
        targets = ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
        reads = ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(rng.randint(0, 2))]
        target, read = "".join(targets), "".join(reads)
        assert edit_counts(targets, reads) == (distance(read, target), len(target))
        within = 0 if target in read else distance(read, target)
        assert edit_counts(targets, reads, "flow_grpo") == (within, len(target))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["RUN"]), r"target words must be a list .*got \[\]"),
        (("RUN", ["RUN"]), "got 'RUN'"),
        (([" "], ["RUN"]), r"the target words \[' '\] are blank"),
        ((["RUN"], "RUN"), "read_words must be a list of strings, got the string 'RUN'"),
        ((["RUN"], ["RUN"], "code"), "unknown variant 'code'; available: paper, flow_grpo"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        edit_counts(*arguments)


def test_the_output_of_the_reward():
    engine = Recital(
        [TextLine("KITE FAR", 0.9, (1, 2, 30, 20)), TextLine("RUN", 0.7, (3, 30, 40, 60))],
        [],
    )
    output = OCREditReward(engine)(IMAGES, [scene("KITE", "RUN"), scene("SUN")])
    np.testing.assert_allclose(output.scores, [1 - 3 / 7, 0], rtol=1e-6)
    assert set(output.parts) == {"edit_distance", "word_accuracy", "ned", "nothing_read"}
    np.testing.assert_array_equal(output.parts["edit_distance"], [3, 3])
    np.testing.assert_array_equal(output.parts["word_accuracy"], [1, 0])
    np.testing.assert_array_equal(output.parts["nothing_read"], [0, 1])
    assert output.words == [["KITE", "FAR", "RUN"], []]
    assert output.confidences == [[0.9, 0.9, 0.7], []]
    np.testing.assert_array_equal(output.regions[0], [[1, 2, 30, 20], [3, 30, 40, 60]])


def test_components_add_up_to_the_score():
    engine = Recital([TextLine("KIXTE", 0.3, (0, 0, 50, 20)), TextLine("RN", 0.7, (0, 30, 40, 60))])
    output = OCREditReward(engine)(IMAGES[:1], [scene("KITE", "RUN")])
    assert sum(part.value for part in output.components[0]) == pytest.approx(output.scores[0]) == 1 - 2 / 7
    assert [part.value for part in output.components[0] if part.kind == "letter"] == [1 / 7] * 5 + [0, 1 / 7]
    assert [(p.kind, p.indices, p.value) for p in output.components[0] if p.kind != "letter"] == [
        ("spurious", (0, 0), -1 / 7)
    ]


def test_scores_stay_in_their_range():
    lines = [TextLine("SEVERAL OTHER WORDS", 1.0, (0, 0, 1, 1))]
    assert OCREditReward(Recital(lines))(IMAGES[:1], [scene("RUN")]).scores == 0.0
    assert OCREditReward(Recital([TextLine("RUN", 0.1, (0, 0, 1, 1))]))(IMAGES[:1], [scene("RUN")]).scores == 1.0


def test_options_of_the_reward():
    assert rewards.make("ocr_edit", variant="flow_grpo").variant == "flow_grpo"
    assert rewards.make("ocr_edit").engine is get_engine("rapidocr")
    with pytest.raises(ValueError, match="unknown variant 'code'; available: paper, flow_grpo"):
        rewards.make("ocr_edit", variant="code")
    with pytest.raises(ValueError, match="unknown option 'lang' of OCR engine 'rapidocr'; available: none"):
        rewards.make("ocr_edit", engine_kwargs={"lang": "en"})
    with pytest.raises(ValueError, match="engine_kwargs are for an engine given by its name"):
        OCREditReward(Recital(), engine_kwargs={"lang": "en"})
    with pytest.raises(ValueError, match="scene 1 has no target words"):
        OCREditReward(Recital([], []))(IMAGES, [scene("RUN"), scene()])


def test_an_episode():
    env = gym.make("VARText-v0", reward="ocr_edit")
    env.reset(seed=0)
    env.action_space.seed(0)
    terminated = False
    while not terminated:
        _, score, terminated, _, info = env.step(env.action_space.sample())
    assert 0.0 <= score <= 1.0
    assert score == info["score"]
    assert "edit_distance" in info["parts"]
