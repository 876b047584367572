"""Mixtures of stubs whose scores are known, and of the real OCR reward with itself."""

import pickle
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from tiny import tiny_agent
from tiny_clip import save_tiny_clip

import rewards
from agents import VMR, MaskPropagation
from rewards.base import Reward, RewardOutput
from rewards.combine import Combined, combine
from rewards.components import Component
from var_env import VARTextVectorEnv, World
from var_env.scenes import render

IMAGES = np.zeros((3, 64, 64, 3), np.uint8)
SCENES = [SimpleNamespace(words=("RUN",))] * 3


class Says(Reward):
    """Gives the scores it was made with, None for not applicable, and whatever else."""

    name = "says"

    def __init__(self, *scores, score_range=None, **rest):
        self.scores, self.score_range, self.rest = scores, score_range, rest

    def score(self, images, scenes):
        scores = np.array([0.0 if score is None else score for score in self.scores], np.float32)
        return RewardOutput(scores, applicable=[score is not None for score in self.scores], **self.rest)


class Brightness(Reward):
    """The brightness of an image, reading nothing."""

    name = "brightness"

    def score(self, images, scenes):
        return RewardOutput(images.mean((1, 2, 3)) / 255)


@pytest.fixture(scope="module")
def batch():
    """Images of the world and their scenes; the last image is empty."""
    world, rng = World(), np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(4)]
    images = np.stack([render(scene) for scene in scenes])
    images[-1] = 128
    return images, scenes


# --- The sum


def test_the_weighted_sum_and_the_parts():
    parts = {"a": Says(1, 2, 3, parts={"ned": np.array([0.1, 0.2, 0.3])}), "b": Says(10, 20, 30)}
    output = Combined(parts, {"b": -0.1, "a": 2.0})(IMAGES, SCENES)
    np.testing.assert_allclose(output.scores, [1, 2, 3], rtol=1e-6)
    assert list(output.parts) == ["a", "a/ned", "b"]
    np.testing.assert_array_equal(output.parts["b"], [10, 20, 30])
    np.testing.assert_allclose(output.parts["a/ned"], [0.1, 0.2, 0.3])
    assert output.scores.dtype == np.float32 and output.applicable.all()


def test_what_is_not_applicable_adds_nothing():
    parts = {"a": Says(1, None, None), "b": Says(10, 20, None), "logged": Says(5, None, 7)}
    output = Combined(parts, {"a": 1.0, "b": 0.5, "logged": 0.0})(IMAGES, SCENES)
    np.testing.assert_array_equal(output.scores, [6, 10, np.nan])  # 10: b alone, with its own weight
    assert output.applicable.tolist() == [True, True, False]
    np.testing.assert_array_equal(output.parts["a"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(output.parts["logged"], [5, np.nan, 7])


def test_parts_of_parts_may_not_apply():
    inner = Says(1, 2, 3, parts={"colour": [0.5, None, None]})
    output = Combined({"a": inner}, {"a": 1})(IMAGES, SCENES)
    np.testing.assert_array_equal(output.parts["a/colour"], [0.5, np.nan, np.nan])


def test_weight_zero_is_logged_and_nothing_else():
    parts = {"a": Says(1, 2, 3), "watch": Says(-100, 100, None, parts={"x": np.ones(3)})}
    output = Combined(parts, {"a": 1.0, "watch": 0})(IMAGES, SCENES)
    np.testing.assert_array_equal(output.scores, [1, 2, 3])
    np.testing.assert_array_equal(output.parts["watch"], [-100, 100, np.nan])
    assert "watch/x" in output.parts


def test_a_score_that_is_no_number_stops_the_mixture():
    class Broken(Says):
        def score(self, images, scenes):
            output = super().score(images, scenes)
            output.scores[1] = np.nan  # past the checks of RewardOutput
            return output

    for weight in (1.0, 0.0):
        with pytest.raises(ValueError, match=r"of image 1 is nan"):
            Combined({"a": Says(1, 2, 3), "b": Broken(1, 2, 3)}, {"a": 1.0, "b": weight})(IMAGES, SCENES)


def test_what_decides_the_scores():
    found = combine({"ocr": 1.0, "clip": 0.0}, {"clip": {"model": "somewhere"}}).describe()
    assert found["ocr/det"] == "PP-OCRv6_det_small.onnx" and found["clip/model"] == "somewhere"


def test_nested():
    inner = Combined({"a": Says(1, 2, None), "b": Says(3, 4, None)}, {"a": 1, "b": 1})
    output = Combined({"inner": inner, "c": Says(1, 1, 1)}, {"inner": 0.5, "c": 1})(IMAGES, SCENES)
    np.testing.assert_array_equal(output.scores, [3, 4, 1])
    assert list(output.parts) == ["inner", "inner/a", "inner/b", "c"]


# --- Normalising


def test_ranges_that_rewards_state():
    parts = {"a": Says(-1, 0, 3, score_range=(-1, 3)), "b": Says(None, 10, 20, score_range=(0, 20)), "c": Says(7, 7, 7)}
    output = Combined(parts, {"a": 1.0, "b": 2.0, "c": 0.0}, "range")(IMAGES, SCENES)
    np.testing.assert_allclose(output.scores, [0, 0.25 + 1, 1 + 2])
    np.testing.assert_array_equal(output.parts["a"], [-1, 0, 3])  # logged as it was


def test_ranges_that_are_given():
    parts = {"a": Says(-1, 0, 3, score_range=(-1, 3)), "hps": Says(8, 10, 14)}
    output = Combined(parts, {"a": 1.0, "hps": 1.0}, {"hps": [8, 12]})(IMAGES, SCENES)
    np.testing.assert_allclose(output.scores, [0 + 0, 0.25 + 0.5, 1 + 1.5])


@pytest.mark.parametrize(
    ("normalise", "message"),
    [
        ("batch", "unknown normalise 'batch': choose 'none', 'range'"),
        ("range", r"reward 'hps' states no range: give it, normalise=\{'hps': \(low, high\)\}"),
        ({"hsp": (0, 1)}, "a range for 'hsp', which is not in the mixture of hps"),
        ({"hps": (1, 1)}, r"range of 'hps' must be two finite numbers, low < high; got \(1, 1\)"),
        ({"hps": (0, float("inf"))}, "range of 'hps' must be two finite numbers"),
        ({"hps": (0, 1, 2)}, "range of 'hps' must be two finite numbers"),
    ],
)
def test_ranges_that_are_none(normalise, message):
    with pytest.raises(ValueError, match=message):
        Combined({"hps": Says(1)}, {"hps": 1.0}, normalise)


# --- What passes through


def test_words_and_regions_are_those_of_the_first_that_reads():
    box = np.array([[1, 2, 3, 4]], np.float32)
    blind = Says(1, 2, 3)
    first = Says(1, 2, 3, words=[["A"], [], []], confidences=[[0.5], [], []], regions=[box, box[:0], box[:0]])
    other = Says(1, 2, 3, words=[["B"]] * 3, confidences=[[0.9]] * 3, regions=[box + 1] * 3)
    output = Combined({"blind": blind, "first": first, "other": other}, {"blind": 1, "first": 0, "other": 1})(
        IMAGES, SCENES
    )
    assert output.words == [["A"], [], []] and output.confidences == [[0.5], [], []]
    np.testing.assert_array_equal(output.regions[0], box)
    assert [len(region) for region in output.regions] == [1, 0, 0]  # where it read nothing, another does not step in
    nothing = Says(1, 2, 3, words=[[], [], []])
    assert Combined({"nothing": nothing, "other": other}, {"nothing": 1, "other": 1})(IMAGES, SCENES).words == [[]] * 3
    assert not Combined({"blind": blind}, {"blind": 1})(IMAGES, SCENES).reads


def test_components_are_as_large_as_in_the_sum():
    parts = [[Component("letter", (0, 0), 1.0)], [Component("letter", (0, 0), 0.5)], [Component("letter", (0, 0), 9.0)]]
    text = Says(1, 2, None, components=parts)
    mixture = Combined({"text": text, "plain": Says(1, 2, 3), "watch": text}, {"text": 3, "plain": 1, "watch": 0})
    expected = [[Component("text/letter", (0, 0), value)] for value in (3.0, 1.5)] + [[]]
    assert mixture(IMAGES, SCENES).components == expected
    ranged = Combined({"text": text}, {"text": -1}, {"text": (0, 4)})
    assert [found[0].value for found in ranged(IMAGES, SCENES).components[:2]] == [-0.25, -0.125]
    assert Combined({"plain": Says(1, 2, 3)}, {"plain": 1})(IMAGES, SCENES).components == [[], [], []]


def test_scenes_need_what_each_reward_needs():
    class NeedsPrompt(Says):
        def check_scenes(self, scenes, count):
            for scene in scenes:
                if not hasattr(scene, "prompt"):
                    raise ValueError("needs `.prompt`")

    only_prompt = [SimpleNamespace(prompt="a dog")] * 3
    assert Combined({"p": NeedsPrompt(1, 2, 3)}, {"p": 1})(IMAGES, only_prompt).scores.tolist() == [1, 2, 3]
    both = Combined({"a": Says(1, 2, 3), "p": NeedsPrompt(1, 2, 3)}, {"a": 1, "p": 1})
    with pytest.raises(ValueError, match=r"needs `.words`"):
        both(IMAGES, only_prompt)
    with pytest.raises(ValueError, match=r"needs `.prompt`"):
        both(IMAGES, SCENES)
    with pytest.raises(ValueError, match="got 2 scenes for 3 images"):
        both(IMAGES, SCENES[:2])


def test_load_loads_those_that_can():
    loaded = []
    able = Says(1)
    able.load = lambda: loaded.append("able")
    Combined({"a": Says(1), "b": able}, {"a": 1, "b": 0}).load()
    assert loaded == ["able"]


# --- Errors


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True])
def test_weights_are_finite_numbers(weight):
    with pytest.raises(ValueError, match=f"the weight of 'b' must be a finite number, got {weight!r}"):
        Combined({"a": Says(1), "b": Says(1)}, {"a": 1.0, "b": weight})


def test_mixtures_of_nothing():
    with pytest.raises(ValueError, match="a mixture needs at least one reward"):
        combine({})
    with pytest.raises(ValueError, match="the weights of ocr are all 0"):
        combine({"ocr": 0.0})
    with pytest.raises(ValueError, match="the weights are of a, the rewards b"):
        Combined({"b": Says(1)}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"weights must map the names .*got \['ocr'\]"):
        combine(["ocr"])


def test_names():
    with pytest.raises(ValueError, match="unknown reward 'orc'; available: ocr"):
        combine({"orc": 1.0})
    with pytest.raises(ValueError, match="options for 'clip', which has no weight; the mixture is of ocr"):
        combine({"ocr": 1.0}, {"clip": {"model": "x"}})
    with pytest.raises(ValueError, match="unknown option 'penalty' of reward 'ocr'"):
        combine({"ocr": 1.0}, {"ocr": {"penalty": 0.6}})
    with pytest.raises(ValueError, match=r"'a/b' has a slash, which names parts: give it another name"):
        Combined({"a/b": Says(1)}, {"a/b": 1.0})


# --- By name, with the real OCR


STRICT = {
    "weights": {"ocr": 1.0, "strict": 0.5, "watch": 0.0},
    "options": {"strict": {"reward": "ocr", "penalty_weight": 2.0}, "watch": {"reward": "ocr_edit"}},
}


def test_ocr_twice_equals_its_formula(batch):
    output = rewards.make("combine", **STRICT)(*batch)
    alone = {weight: rewards.make("ocr", penalty_weight=weight)(*batch) for weight in (0.6, 2.0)}
    np.testing.assert_allclose(output.scores, alone[0.6].scores + 0.5 * alone[2.0].scores, rtol=1e-6)
    np.testing.assert_array_equal(output.parts["strict"], alone[2.0].scores)
    for name, part in alone[0.6].parts.items():
        np.testing.assert_array_equal(output.parts[f"ocr/{name}"], part)
    assert output.words == alone[0.6].words and output.words[0] and not output.words[-1]
    assert output.confidences == alone[0.6].confidences
    for region, expected in zip(output.regions, alone[0.6].regions, strict=True):
        np.testing.assert_array_equal(region, expected)
    assert {"watch", "watch/word_accuracy"} <= set(output.parts)


def test_ocr_with_clip(batch, tmp_path):
    options = {"clip": {"model": str(save_tiny_clip(tmp_path)), "device": "cpu"}}
    output = combine({"ocr": 1.0, "clip": 0.3}, options)(*batch)
    clip = rewards.make("clip", **options["clip"])(*batch)
    # Parts of the order of 1 may cancel, and float32 rounds each to about 1e-7: hence an absolute tolerance.
    expected = rewards.make("ocr")(*batch).scores + 0.3 * clip.scores
    np.testing.assert_allclose(output.scores, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.parts["clip"], clip.scores, rtol=1e-5)


def test_copies_give_the_same(batch):
    reward = rewards.make("combine", **STRICT)
    images, scenes = batch
    copy = pickle.loads(pickle.dumps(reward))
    np.testing.assert_array_equal(copy(images[:1], scenes[:1]).scores, reward(images[:1], scenes[:1]).scores)


def test_gym_make_and_json(tokenizer):
    env = gym.make("VARText-v0", reward="combine", reward_kwargs=STRICT)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    reward = again.unwrapped.reward
    assert reward.weights == {"ocr": 1.0, "strict": 0.5, "watch": 0.0}
    assert reward.rewards["strict"].penalty_weight == 2.0
    nested = {"weights": {"all": 1.0}, "options": {"all": {"reward": "combine", **STRICT}}, "normalise": "none"}
    envs = VARTextVectorEnv(2, tokenizer=tokenizer, reward="combine", reward_kwargs=nested)
    envs.reset(seed=0)
    for h, w in envs.schedule.grids:
        _, score, _, _, info = envs.step(np.zeros((2, h, w), np.int64))
    np.testing.assert_allclose(score, info["parts"]["all"])
    assert info["parts"]["all/ocr/nothing_read"].shape == (2,)


def test_masks_and_forks_see_the_regions(parts, reward):
    """VMR forks, and Mask Propagation takes the regions of the toy reward, behind one that reads nothing."""
    mixed = Combined({"brightness": Brightness(), "seen": reward}, {"brightness": 1.0, "seen": 0.0})
    mixture, alone = (
        MaskPropagation(tiny_agent(parts | {"reward": reward}, VMR, split=2, suffix_samples=2))
        for reward in (mixed, reward)
    )
    rollout, expected = mixture.sample(), alone.sample()
    torch.testing.assert_close(rollout.scores, expected.scores)
    assert rollout.words_read == expected.words_read
    for mask, other in zip(mixture.masks(rollout), alone.masks(expected), strict=True):
        assert torch.equal(mask, other)
    assert 0 < mask.float().mean() < 1  # of the finest grid
    summary = rollout.summary()
    assert summary["brightness"] == pytest.approx(summary["seen/mean"]) == pytest.approx(summary["reward"])


def test_text_rewards_state_their_range():
    reward = combine({"ocr": 1.0, "ocr_edit": 1.0}, {"ocr": {"penalty_weight": 0.5}}, normalise="range")
    assert reward.rewards["ocr"].score_range == (-0.5, 2.0)
    scene = World(64).sample(np.random.default_rng(0))
    images = np.stack([np.zeros((64, 64, 3), np.uint8), render(scene)])
    assert reward(images, [scene, scene]).scores == pytest.approx([0.0, 2.0], abs=0.05)
