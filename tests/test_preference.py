"""The CLIP-based preference score on a small checkpoint of the real classes, with random weights."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny_clip
from transformers import CLIPModel, CLIPProcessor

import rewards
from var_env.scenes import World, render


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save_tiny_clip(tmp_path_factory.mktemp("clip"))
    model = CLIPModel.from_pretrained(folder)
    torch.nn.init.constant_(model.logit_scale, 1.5)  # unlike CLIP's value at birth
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def batch():
    world, rng = World(), np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(7)]
    return np.stack([render(scene) for scene in scenes]), scenes


def naive(folder, image, prompt):
    """One image, as the model's card has it."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    text = processor(text=prompt, truncation=True, max_length=20, return_tensors="pt")
    pixels = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values
    with torch.no_grad():
        words = model.text_projection(model.text_model(**text).pooler_output)[0]
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        return float(model.logit_scale.exp() * (words / words.norm()) @ (seen / seen.norm()))


def test_equals_one_image_at_a_time(checkpoint, batch):
    images, scenes = batch
    expected = [naive(checkpoint, image, scene.prompt) for image, scene in zip(images, scenes, strict=True)]
    for batch_size in (1, 3, 7):
        output = rewards.make("preference", model=checkpoint, device="cpu", batch_size=batch_size)(images, scenes)
        np.testing.assert_allclose(output.scores, expected, atol=1e-4)
    assert output.scores.dtype == np.float32 and output.words == [[]] * 7
    assert min(expected) < 0 < max(expected) <= np.exp(1.5)  # both signs count, unlike CLIPScore's


def test_half_precision_is_near(checkpoint, batch):
    scores = rewards.make("preference", model=checkpoint, device="cpu")(*batch).scores
    for dtype in ("bfloat16", "float16"):
        half = rewards.make("preference", model=checkpoint, device="cpu", dtype=dtype)(*batch).scores
        np.testing.assert_allclose(half, scores, atol=0.2)
        assert not np.array_equal(half, scores)


def test_whose_processor(checkpoint):
    assert rewards.make("preference").processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert rewards.make("preference", model=checkpoint).processor == checkpoint
    assert rewards.make("preference", processor=checkpoint).processor == checkpoint


def test_by_name_in_an_environment(checkpoint, tokenizer):
    options = {"model": checkpoint, "device": "cpu"}
    env = gym.make("VARText-v0", tokenizer=tokenizer, reward="preference", reward_kwargs=options)
    env.reset(seed=0)
    for h, w in env.unwrapped.schedule.grids:
        _, score, terminated, _, info = env.step(np.zeros((h, w), np.int64))
    assert terminated
    assert score == pytest.approx(naive(checkpoint, info["image"], env.unwrapped.scene.prompt), abs=1e-4)
