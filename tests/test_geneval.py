"""GenEval's rules on boxes by hand, and the reward on a detector that finds what it is told."""

import pickle
from dataclasses import dataclass
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from tiny_models import save_tiny_grounding_dino

import rewards
from rewards.detection import Detection
from rewards.geneval import COLOURS, Clause, GenEval, nearest_colour, relations, score_clause
from var_env import VARTextEnv
from var_env.scenes import Scene

IMAGES = np.zeros((3, 64, 64, 3), np.uint8)


def box(label, x, y, size=10, score=0.9):
    """An object with its centre at x, y."""
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def scene(*clauses):
    return SimpleNamespace(clauses=clauses)


class Finds:
    """A detector that finds what it was given, image by image, and notes what it was asked."""

    def __init__(self, *found):
        self.found, self.asked, self.seen = list(found), [], None

    def detect(self, images, labels):
        self.asked, self.seen = labels, images
        return self.found


def score(clause, *found, colours=()):
    names = dict(zip([one.box for one in found], colours, strict=False))
    return score_clause(Clause(*clause), found, lambda one: names[one.box])


# --- The rules


@pytest.mark.parametrize(("found", "expected"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (6, 0), (9, 0)])
def test_counting_falls_to_zero_and_no_further(found, expected):
    dogs = [box("dog", 5 * i, 30) for i in range(found)]
    assert score(("count", "dog", 3), *dogs, box("cat", 50, 50)) == pytest.approx(expected)


def test_the_colour_of_a_part_of_the_objects():
    dogs, cat = [box("dog", 10 * i, 30) for i in range(4)], box("cat", 50, 50)
    assert score(("colour", "dog", "red"), *dogs, cat, colours=["red", "blue", "red", "red", "green"]) == 0.75
    assert score(("colour", "dog", "green"), *dogs, cat, colours=["red"] * 4 + ["green"]) == 0


@pytest.mark.parametrize(
    ("dog", "cat", "expected"),
    [
        ((10, 30), (50, 30), {"left of"}),
        ((50, 30), (10, 30), {"right of"}),
        ((30, 10), (30, 50), {"above"}),  # y grows downwards
        ((30, 50), (30, 10), {"below"}),
        ((10, 10), (50, 50), {"left of", "above"}),
        ((30, 30), (30, 30), set()),
        ((30, 30), (32, 30), set()),  # within a tenth of both sizes, 0.1 * (10 + 10) = 2
        ((30, 30), (34.1, 30), {"left of"}),  # 4.1 - 2 is more than half of 4.1
        ((30, 30), (33.9, 30), set()),
        ((10, 30), (50, 50), {"left of"}),  # 38 on x and 18 on y, of 44.7
    ],
)
def test_relations_of_two_boxes(dog, cat, expected):
    assert relations(box("dog", *dog).box, box("cat", *cat).box) == expected


def test_larger_boxes_must_be_further_apart():
    assert relations(box("dog", 20, 30, size=20).box, box("cat", 30, 30, size=20).box) == {"left of"}
    assert relations(box("dog", 20, 30, size=40).box, box("cat", 30, 30, size=40).box) == set()
    assert relations((0, 0, 40, 10), (0, 10, 40, 20)) == {"above"}  # an axis has its own sizes


def test_a_position_is_the_share_of_the_pairs():
    dogs, cats = [box("dog", 10, 30), box("dog", 60, 30)], [box("cat", 30, 30), box("cat", 40, 30)]
    clause = ("position", "dog", "left of", "cat")
    assert score(clause, dogs[0], *cats) == 1
    assert score(clause, *dogs, *cats) == 0.5
    assert score(clause, dogs[1], *cats) == 0


@pytest.mark.parametrize("clause", [("count", "dog", 1), ("colour", "dog", "red"), ("position", "dog", "above", "cat")])
def test_a_missing_object_fails_its_clauses(clause):
    assert score(clause) == score(clause, box("cat", 30, 50), colours=["red"]) == 0
    assert score(("position", "cat", "below", "dog"), box("cat", 30, 50)) == 0


# --- The reward


def test_a_failed_position_is_not_a_success_too():
    """Flow-GRPO's server appends 0 for it and then 1, and would give (1 + 1 + 0 + 1) / 4 here."""
    clauses = (("count", "cat", 1), ("count", "dog", 1), ("position", "dog", "left of", "cat"))
    right, wrong = [box("dog", 10, 30), box("cat", 50, 30)], [box("dog", 50, 30), box("cat", 10, 30)]
    output = GenEval(Finds(right, wrong))(IMAGES[:2], [scene(*clauses)] * 2)
    np.testing.assert_allclose(output.scores, [1, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(output.parts["position"], [1, 0])
    only = GenEval(Finds(wrong))(IMAGES[:1], [scene(clauses[2])])
    assert only.scores.tolist() == [0]


def test_clauses_are_averaged_and_kinds_are_logged():
    image = IMAGES.copy()
    image[0, 20:40, 0:30] = COLOURS["red"]
    image[0, 20:40, 30:] = COLOURS["blue"]
    dogs = [box("dog", 10, 30), box("dog", 50, 30), box("dog", 55, 30)]
    clauses = [
        ("count", "dog", 2),
        ["colour", "dog", "red"],
        Clause("count", "cat", 1),
        ("position", "dog", "above", "cat"),
    ]
    detector = Finds(dogs, [])
    output = GenEval(detector)(image[:2], [scene(*clauses), scene(("colour", "cat", "black"))])
    assert detector.asked == [["dog", "cat"], ["cat"]]  # each label once
    np.testing.assert_allclose(output.scores, [(1 / 2 + 1 / 3 + 0 + 0) / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(output.parts["count"], [1 / 4, np.nan])
    np.testing.assert_allclose(output.parts["colour"], [1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(output.parts["position"], [0, np.nan])
    np.testing.assert_array_equal(output.regions[0], [one.box for one in dogs])
    assert output.regions[1].shape == (0, 4) and output.words == [[], []] and output.reads
    first, (cat,) = output.components
    assert [(part.kind, part.indices) for part in first] == [("clause", (i,)) for i in range(4)]
    assert sum(part.value for part in first) == pytest.approx(output.scores[0])
    np.testing.assert_array_equal(first[0].boxes, [one.box for one in dogs])
    assert first[2].boxes is None and cat.boxes is None  # no cat was found


def test_no_clauses_no_score():
    detector = Finds([box("dog", 10, 30)])
    images = np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (1, 2, 3)])
    output = GenEval(detector)(images, [scene(), scene(("count", "dog", 1)), scene()])
    assert output.applicable.tolist() == [False, True, False]
    np.testing.assert_array_equal(output.scores, [np.nan, 1, np.nan])
    assert (detector.seen == 2).all() and len(detector.seen) == 1  # the others are not even looked at
    never = GenEval(Finds())(images, [scene()] * 3)
    assert not never.applicable.any() and np.isnan(never.parts["count"]).all()


def test_the_colours_of_flat_patches():
    for name, rgb in COLOURS.items():
        image = np.full((64, 64, 3), (90, 90, 90), np.uint8)
        image[20:40, 10:30] = rgb
        assert nearest_colour(image, Detection("patch", 1.0, (10, 20, 30, 40))) == name
        assert nearest_colour(image, Detection("patch", 1.0, (5, 15, 35, 45))) == name  # a loose box, by its middle
        assert nearest_colour(image, Detection("patch", 1.0, (20, 30, 20, 30))) == name  # an empty one
    image[:, 60:] = COLOURS["red"]
    assert nearest_colour(image, Detection("patch", 1.0, (70, 70, 90, 90))) == "red"  # outside: the pixel nearest to it


def test_another_classifier_of_colours():
    seen = []

    def colour_of(image, detection):
        seen.append((image.shape, detection.label))
        return "teal"

    clause = ("colour", "dog", "teal")
    assert GenEval(Finds([box("dog", 1, 1)]), colour_of=colour_of)(IMAGES[:1], [scene(clause)]).scores == 1
    assert seen == [((64, 64, 3), "dog")]
    with pytest.raises(
        ValueError, match=r"\('colour', 'dog', 'teal', None\) of scene 0 .*never found; available: red, or"
    ):
        GenEval(Finds([]))(IMAGES[:1], [scene(clause)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("dog", "'dog' is no clause"),
        (("count", "dog"), r"\('count', 'dog'\) is no clause; a clause is kind, label, value"),
        (("size", "dog", 2), "unknown kind 'size' .*available: count, colour, position"),
        (("count", "", 2), "needs a label that is a non-blank string, got ''"),
        (("count", "dog", 0), "a whole number of at least 1, got 0"),
        (("count", "dog", True), "a whole number of at least 1, got True"),
        (("count", "dog", 2.0), r"a whole number of at least 1, got 2\.0"),
        (("colour", "dog", 3), "the name of a colour, got 3"),
        (("colour", "dog", "red", "cat"), "has 'cat' too many"),
        (("position", "dog", "near", "cat"), "unknown relation 'near' .*available: left of, right of, above, below"),
        (("position", "dog", "above"), "needs a label that is a non-blank string, got None"),
        (("position", "dog", "above", "dog"), "relates 'dog' to itself"),
    ],
)
def test_what_is_no_clause(entry, message):
    with pytest.raises(ValueError, match=rf"scene 1: .*{message}"):
        GenEval(Finds([], []))(IMAGES[:2], [scene(("count", "dog", 1)), scene(entry)])


def test_scenes_need_clauses():
    with pytest.raises(ValueError, match=r"scene 0 .*needs `.clauses`, a sequence such as .*; got None"):
        GenEval(Finds([]))(IMAGES[:1], [SimpleNamespace(words=("RUN",))])
    with pytest.raises(ValueError, match="got 1 scenes for 2 images"):
        GenEval(Finds([], []))(IMAGES[:2], [scene()])


def test_what_a_detector_must_not_say():
    asks = [scene(("count", "dog", 1))]
    with pytest.raises(ValueError, match="gave 2 answers for 1 images"):
        GenEval(Finds([], []))(IMAGES[:1], asks)
    with pytest.raises(ValueError, match=r"found Detection\(label='cat'.* in image 0, when asked for dog"):
        GenEval(Finds([box("cat", 1, 1)]))(IMAGES[:1], asks)
    with pytest.raises(ValueError, match=r"found Detection\(label='dog'.*nan"):
        GenEval(Finds([box("dog", np.nan, 1)]))(IMAGES[:1], asks)


# --- By name


def test_by_name():
    reward = rewards.make("geneval", detector_kwargs={"model": "nobody/has-this", "threshold": 0.4})
    assert reward.name == "geneval" and reward.score_range == (0, 1)
    assert reward.detector.model == "nobody/has-this" and reward.detector.threshold == 0.4
    assert len(pickle.dumps(reward)) < 1000
    with pytest.raises(ValueError, match="unknown detector 'yolo'; available: grounding_dino"):
        rewards.make("geneval", detector="yolo")
    with pytest.raises(ValueError, match="detector_kwargs are for a detector given by its name"):
        GenEval(Finds(), {"threshold": 0.4})


def test_with_grounding_dino(tmp_path):
    """Random weights: what it finds means nothing, but the clauses are judged on it, image by image."""
    options = {"model": str(save_tiny_grounding_dino(tmp_path)), "device": "cpu", "threshold": 0.0}
    reward = rewards.make("geneval", detector_kwargs=options)
    images = np.random.default_rng(0).integers(256, size=(2, 64, 64, 3), dtype=np.uint8)
    clauses = ("count", "dog", 2), ("colour", "cat", "red"), ("position", "dog", "above", "cat")
    output = reward(images, [scene(*clauses), scene(clauses[0])])
    found = reward.detector.detect(images, [["dog", "cat"], ["dog"]])
    assert any(found) and [len(region) for region in output.regions] == [len(objects) for objects in found]
    for i, objects in enumerate(found):
        dogs = sum(one.label == "dog" for one in objects)
        assert output.parts["count"][i] == max(1 - abs(dogs - 2) / 2, 0)


def test_load_loads_the_detector():
    detector = Finds()
    GenEval(detector).load()  # it has nothing to load
    detector.load = lambda: detector.asked.append("loaded")
    GenEval(detector).load()
    assert detector.asked == ["loaded"]


@dataclass(frozen=True)
class Objects(Scene):
    """A scene of the world that lists objects."""

    clauses: tuple = ()


def test_an_environments_reward(tokenizer):
    scene = Objects('a dog below "RUN"', ("RUN",), clauses=(("count", "dog", 2),))
    env = VARTextEnv(tokenizer=tokenizer, reward=GenEval(Finds([box("dog", 10, 30)])))
    env.reset(options={"scene": scene})
    score, info = [env.step(np.zeros(grid, int)) for grid in env.schedule.grids][-1][1::3]
    assert score == info["parts"]["count"] == 0.5 and np.isnan(info["parts"]["colour"])
    assert len(info["regions"]) == 1
    made = gym.make("VARText-v0", reward="geneval", reward_kwargs={"detector_kwargs": {"threshold": 0.5}})
    assert isinstance(made.unwrapped.reward, GenEval)
    again = gym.make(EnvSpec.from_json(made.spec.to_json()))
    assert again.unwrapped.reward.detector.threshold == 0.5
