"""The contract of a reward: what goes in, what comes out, and what is said when either is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest

import rewards
from rewards.base import Reward, RewardOutput


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


def test_an_empty_batch_gives_an_empty_output():
    assert Brightness()(IMAGES[:0], []).scores.shape == (0,)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 255.0, r"got dtype float64 with values in \[0.2, 0.2\]; .*multiply by 255.*cast"),
        (np.full((1, 64, 64, 3), np.nan, np.float32), "got dtype float32 with values in .*nan"),
        (IMAGES.astype(np.uint16), r"got dtype uint16 .*rescale to \[0, 255\]"),
        (IMAGES.transpose(0, 3, 1, 2), r"got \(2, 3, 64, 64\); .*transpose\(0, 2, 3, 1\)"),
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
