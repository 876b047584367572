"""The contract of a reward: what goes in, what comes out, and what is said when either is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_policy

import rewards
from agents.rollout import collect
from agents.sampling import Decoding
from rewards.base import Reward, RewardOutput
from rewards.reason import reason
from var_env import VARTextVectorEnv
from var_env.scenes import Scene


class Brightness(Reward):
    """The mean of the image, as the smallest of rewards."""

    name = "brightness"

    def score(self, images, scenes):
        return RewardOutput(scores=images.mean(axis=(1, 2, 3)) / 255)


def scenes(count):
    return [SimpleNamespace(words=("RUN",)) for _ in range(count)]


IMAGES = np.full((2, 64, 64, 3), 51, np.uint8)


def test_a_reward_returns_float32_and_fills_what_it_does_not_read():
    output = Brightness()(IMAGES, scenes(2))
    np.testing.assert_allclose(output.scores, [0.2, 0.2], rtol=1e-6)
    assert output.scores.dtype == np.float32
    assert output.parts == {}
    assert output.words == [[], []]
    assert output.confidences == [[], []]
    assert [region.shape for region in output.regions] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 255.0, r"got dtype float64 with values in \[0.2, 0.2\]; .*multiply by 255.*cast"),
        (np.full((1, 64, 64, 3), np.nan, np.float32), "got dtype float32 with values in .*nan"),
        (IMAGES.astype(np.uint16), r"got dtype uint16 .*rescale to \[0, 255\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"got \(2, 3, 64, 64\); .*transpose\(0, 2, 3, 1\)"),
        (IMAGES[:0], r"the batch is empty, of shape \(0, 64, 64, 3\)"),
        (IMAGES[0], r"got \(64, 64, 3\); add the batch axis"),
        (IMAGES[..., 0], r"got \(2, 64, 64\)"),
        (IMAGES[..., :1], r"repeat the grey channel"),
        (np.zeros((1, 64, 64, 4), np.uint8), r"drop alpha"),
        (np.zeros((1, 64, 64, 5), np.uint8), r"last axis must be R, G, B"),
        (np.zeros((1, 15, 64, 3), np.uint8), r"at least 16 pixels, got 15 x 64"),
        (list(IMAGES), r"got list; .*np.stack"),
    ],
)
def test_images_of_another_form_are_refused_with_the_remedy(images, message):
    with pytest.raises(ValueError, match=message):
        Brightness()(images, scenes(len(images)))


def test_torch_tensors_are_refused_with_the_remedy():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"got Tensor; call .cpu\(\).numpy\(\)"):
        Brightness()(torch.from_numpy(IMAGES), scenes(2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (scenes(3), "got 3 scenes for 2 images"),
        ([*scenes(1), SimpleNamespace(words=())], "scene 1 has no target words"),
        ([*scenes(1), SimpleNamespace(words=("RUN", " "))], "target word ' ' of scene 1"),
        ([*scenes(1), SimpleNamespace(words="RUN")], "scene 1 .*a sequence of strings; got 'RUN'"),
        (["RUN", "FAR"], "scene 0 .*needs `.words`"),
    ],
)
def test_scenes_of_another_form_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Brightness()(IMAGES, bad)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_with_the_image(value):
    with pytest.raises(ValueError, match=r"score of image 1 is (nan|inf|-inf)"):
        RewardOutput(scores=np.array([0.0, value, value]))
    with pytest.raises(ValueError, match="similarity of image 2"):
        RewardOutput(scores=np.zeros(3), parts={"similarity": np.array([0, 0, value])})


# --- Not applicable


def test_not_applicable_is_nan_there_and_nowhere_else():
    output = RewardOutput(
        scores=np.array([0.5, 7.0, np.nan]),
        parts={
            "list": [1.0, None, 2.0],
            "objects": np.array([None, None, 3], object),
            "masked": np.ma.masked_array([1.0, np.inf, 2.0], [False, True, False]),
        },
        applicable=[True, False, False],
    )
    np.testing.assert_array_equal(output.scores, [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(output.parts["list"], [1, np.nan, 2])
    np.testing.assert_array_equal(output.parts["objects"], [np.nan, np.nan, 3])
    np.testing.assert_array_equal(output.parts["masked"], [1, np.nan, 2])
    assert output.applicable.tolist() == [True, False, False]
    for part in (output.scores, *output.parts.values()):
        assert type(part) is np.ndarray and part.dtype == np.float32
    assert RewardOutput(np.zeros(2)).applicable.tolist() == [True, True]
    assert RewardOutput(np.zeros(0), {"part": np.zeros(0)}, applicable=[]).applicable.shape == (0,)


def test_an_accidental_nan_is_an_error_even_beside_what_is_not_applicable():
    with pytest.raises(ValueError, match=r"the score of image 0 is nan \(1 of 2 not finite\)"):
        RewardOutput([np.nan, np.nan], applicable=[True, False])
    with pytest.raises(ValueError, match="the ned of image 1 is nan"):
        RewardOutput(np.zeros(2), {"ned": [None, np.nan]})
    with pytest.raises(ValueError, match="the ned of image 1 is inf"):
        RewardOutput(np.zeros(2), {"ned": np.ma.masked_array([0, np.inf], [True, False])})
    with pytest.raises(ValueError, match="the score of image 1 is nan"):
        RewardOutput([0.0, None])  # a score says so with `applicable`
    with pytest.raises(ValueError, match=r"applicable has shape \(3,\), expected \(2,\)"):
        RewardOutput(np.zeros(2), applicable=[True] * 3)


def test_an_output_knows_whether_the_reward_reads():
    assert not RewardOutput(np.zeros(2)).reads
    blind = RewardOutput(np.zeros(2), words=[[], []])  # it looked and found nothing
    assert blind.reads and blind.reads_words
    boxes = RewardOutput(np.zeros(1), regions=[np.zeros((1, 4), np.float32)])
    assert boxes.reads and not boxes.reads_words


class Sometimes(Brightness):
    """Applies to scenes with a topic and asks for no words."""

    def check_scenes(self, scenes, count):
        if not all(hasattr(scene, "topic") for scene in scenes):
            raise ValueError("needs `.topic`")

    def score(self, images, scenes):
        applicable = np.array([scene.topic is not None for scene in scenes])
        shade = images.mean(axis=(1, 2, 3)) / 255
        parts = {"shade": np.ma.masked_array(shade, ~applicable), "never": [None] * len(images)}
        return RewardOutput(shade, parts, applicable=applicable)


def test_a_reward_says_what_a_scene_must_have():
    assert Sometimes()(IMAGES, topics("cats", "nothing")).applicable.tolist() == [True, False]
    with pytest.raises(ValueError, match=r"needs `.topic`"):
        Sometimes()(IMAGES, scenes(2))


class Topic(Scene):
    """A scene without words."""

    @property
    def topic(self):
        return None if self.prompt == "nothing" else self.prompt


def topics(*prompts):
    return [Topic(prompt, ()) for prompt in prompts]


def test_an_environment_needs_a_score(tokenizer):
    envs = VARTextVectorEnv(2, tokenizer=tokenizer, reward=Sometimes())

    def play(*prompts):
        envs.reset(options={"scenes": topics(*prompts)})
        return [envs.step(np.zeros((2, h, w), int)) for h, w in envs.schedule.grids][-1][-1]

    info = play("cats", "dogs")
    assert np.isfinite(info["score"]).all() and np.isnan(info["parts"]["never"]).all()
    with pytest.raises(ValueError, match=r"reward is not applicable to row 1, 'nothing', and an episode needs a score"):
        play("cats", "nothing")


def test_a_rollout_sums_up_what_applies(tokenizer):
    envs = VARTextVectorEnv(2, tokenizer=tokenizer, reward=Sometimes())
    drawn = collect(tiny_policy(tokenizer), envs, 2, Decoding(), scenes=topics("cats", "dogs"))
    assert "never" not in drawn.summary()
    assert drawn.summary()["shade"] == float(drawn.parts["shade"].mean())
    drawn.parts["shade"][1:3] = np.nan
    assert drawn.summary()["shade"] == pytest.approx(float(drawn.parts["shade"][[0, 3]].mean()))
    drawn.parts["shade"][:] = np.nan
    assert "shade" not in drawn.summary()


# --- Outputs and names


def test_an_output_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(B,\), got \(2, 1\)"):
        RewardOutput(scores=np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"part 'ned' has shape \(3,\), expected \(2,\)"):
        RewardOutput(scores=np.zeros(2), parts={"ned": np.zeros(3)})
    with pytest.raises(ValueError, match="words holds 1 entries, expected 2"):
        RewardOutput(scores=np.zeros(2), words=[["RUN"]])

    class Short(Brightness):
        def score(self, images, scenes):
            return RewardOutput(scores=np.zeros(1))

    with pytest.raises(ValueError, match="gave 1 scores, not 2"):
        Short()(IMAGES, scenes(2))


def test_make_builds_a_reward_by_name():
    reward = rewards.make("ocr", penalty_weight=0.3)
    assert isinstance(reward, rewards.OCRReward)
    assert reward.penalty_weight == 0.3


def test_make_names_what_exists():
    with pytest.raises(ValueError, match="unknown reward 'orc'; available: ocr"):
        rewards.make("orc")
    with pytest.raises(ValueError, match="option 'penalty' of reward 'ocr'; available: engine, penalty_weight"):
        rewards.make("ocr", penalty=0.3)
    with pytest.raises(ValueError, match="unknown OCR engine 'tesseract'; available: rapidocr"):
        rewards.make("ocr", engine="tesseract")


@pytest.mark.parametrize(("name", "option"), [("service", "url"), ("pool", "reward"), ("combine", "weights")])
def test_an_option_that_is_missing(name, option):
    with pytest.raises(ValueError, match=f"reward '{name}' needs the option '{option}'"):
        rewards.make(name)


def test_an_error_that_says_nothing_gets_a_text():
    class Mute(Brightness):
        def score(self, images, scenes):
            raise TimeoutError

    with pytest.raises(RuntimeError, match=r"'brightness' failed: TimeoutError in score, .*test_rewards_base.py:\d+"):
        Mute()(IMAGES, scenes(2))
    assert reason(ValueError("a text")) == "a text" and reason(ValueError()) == "ValueError"
    assert reason(KeyError("grids")) == "KeyError 'grids'"


def test_numbers_of_colours_are_not_to_be_taken_for_grey():
    for images in (IMAGES[..., :1], IMAGES[..., 0]):
        with pytest.raises(ValueError, match=r'Image.open\(FILE\).convert\("RGB"\)'):
            Brightness()(images, scenes(2))
