"""CLIPScore on a small checkpoint of the real classes, with random weights."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import MAX_TOKENS, save_tiny_clip
from transformers import CLIPModel, CLIPProcessor

import rewards
from rewards import CLIPScore
from var_env import VARTextVectorEnv
from var_env.scenes import World, render


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def batch():
    """Images of the world and their scenes."""
    world, rng = World(), np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(9)]
    return np.stack([render(scene) for scene in scenes]), scenes


def scene(prompt):
    return SimpleNamespace(words=("RUN",), prompt=prompt)


def naive(folder, image, prompt):
    """Eq. 1 for one image, step by step, without padding."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(prompt).input_ids
    if len(tokens) > MAX_TOKENS:
        tokens = [*tokens[: MAX_TOKENS - 1], tokens[-1]]  # the end token stays
    pixels = processor.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        text = model.text_projection(model.text_model(torch.tensor([tokens])).pooler_output)[0]
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
    return 2.5 * max(float(text @ seen / (text.norm() * seen.norm())), 0.0)


def test_equals_one_image_at_a_time(checkpoint, batch):
    images, scenes = batch
    output = CLIPScore(str(checkpoint), device="cpu")(images, scenes)
    expected = [naive(checkpoint, image, scene.prompt) for image, scene in zip(images, scenes, strict=True)]
    np.testing.assert_allclose(output.scores, expected, atol=1e-5)
    assert output.scores.dtype == np.float32 and len(set(expected)) > 5
    assert min(expected) == 0 < max(expected) <= 2.5  # both sides of the maximum are seen
    assert output.parts == {} and output.words == [[]] * 9


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_the_batch_size_does_not_matter(checkpoint, batch, batch_size):
    whole = CLIPScore(checkpoint, device="cpu")(*batch).scores
    parts = CLIPScore(checkpoint, device="cpu", batch_size=batch_size)(*batch).scores
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_prompts_of_any_length(checkpoint, batch):
    prompts = ["a", "the red wall", "the wall " * 40, "the wall " * 40 + "is blue"]
    scores = CLIPScore(checkpoint, device="cpu")(batch[0][[3] * 4], [scene(prompt) for prompt in prompts]).scores
    np.testing.assert_allclose(scores, [naive(checkpoint, batch[0][3], prompt) for prompt in prompts], atol=1e-5)
    assert scores[2] == pytest.approx(scores[3], abs=1e-6)  # what differs lies beyond the maximum


def test_an_environments_reward(checkpoint, tokenizer):
    envs = VARTextVectorEnv(2, tokenizer=tokenizer, reward="clip", reward_kwargs={"model": str(checkpoint)})
    envs.reset(seed=0)
    for h, w in envs.schedule.grids:
        _, score, terminated, _, info = envs.step(np.zeros((2, h, w), np.int64))
    expected = [naive(checkpoint, *pair) for pair in zip(info["image"], (s.prompt for s in envs.scenes), strict=True)]
    np.testing.assert_allclose(score, expected, atol=1e-5)
    assert terminated.all() and info["words_read"] == [[], []]


def test_copies_hold_no_weights(checkpoint, batch):
    reward = rewards.make("clip", model=str(checkpoint), device="cpu")
    score = reward(*batch).scores
    assert len(pickle.dumps(reward)) < 1000
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        np.testing.assert_array_equal(other(*batch).scores, score)


@pytest.mark.parametrize("other", [SimpleNamespace(words=("RUN",)), scene(None), scene(" "), scene(("RUN",))])
def test_scenes_without_a_prompt(checkpoint, batch, other):
    with pytest.raises(ValueError, match=r"scene 1 .*needs `.prompt`, the text to compare the image with; got"):
        CLIPScore(checkpoint)(batch[0][:2], [scene("a red wall"), other])


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CLIPScore(batch_size=0)


class TestMissingWeights:
    def test_nothing_is_loaded_before_the_first_call(self):
        assert CLIPScore("nobody/has-this").model == "nobody/has-this"

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(OSError, match=f"'{tmp_path}': the folder needs config.json, the weights"):
            CLIPScore(tmp_path).load()

    def test_a_folder_without_the_processor(self, checkpoint, tmp_path):
        CLIPModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"the folder needs config\.json.*preprocessor_config\.json"):
            CLIPScore(tmp_path).load()

    def test_weights_that_are_not_all_there(self, checkpoint, tmp_path):
        """`transformers` fills such gaps at random and goes on."""
        model = CLIPModel.from_pretrained(checkpoint)
        weights = {name: weight for name, weight in model.state_dict().items() if "visual_projection" not in name}
        model.save_pretrained(tmp_path, state_dict=weights)
        CLIPProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"lacks 1 weights, such as visual_projection\.weight"):
            CLIPScore(tmp_path).load()
