"""HPSv3 on a small Qwen2-VL of the real classes, with random weights in the public checkpoint's format."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_git, save_tiny_hps
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

import rewards
from rewards import hps

PROMPTS = ["A cat", 'A navy sign that says "KITE" above "RUN" in white letters', "a {red} wall", "the wall " * 20]
SCENES = [SimpleNamespace(prompt=prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_hps(tmp_path_factory.mktemp("hps"))


@pytest.fixture(scope="module")
def images():
    """Of 64 x 64 pixels, smooth, so that enlarging them keeps what tells them apart."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


def make(folders, **options):
    return rewards.make("hps", model=folders[0], base=folders[1], device="cpu", **options)


def naive(folders, image, prompt):
    """One image, as the authors' program goes: the whole model, its embeddings filled in by hand, then the head."""
    folder, base = folders
    weights = load_file(folder / "HPSv3.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    model = Qwen2VLForConditionalGeneration(config).eval()
    names = {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): key
        for key in model.state_dict()
    }
    model.load_state_dict({names[key]: weight for key, weight in weights.items() if key in names})
    resized = Image.fromarray(image).resize((448, 448), Image.Resampling.BICUBIC)
    pixels = Qwen2VLImageProcessor.from_pretrained(base)(resized, return_tensors="pt")
    assert pixels.image_grid_thw.tolist() == [[1, 32, 32]]
    text = hps.BEFORE_IMAGE + "<|image_pad|>" * 256 + hps.AFTER_IMAGE.replace("{prompt}", prompt)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        seen = model.model.visual(pixels.pixel_values, grid_thw=pixels.image_grid_thw).pooler_output
        embeds[ids == config.image_token_id] = seen
        state = model.model.language_model(inputs_embeds=embeds).last_hidden_state[ids == len(tokenizer) - 1][0]
        for layer in (0, 3, 5):
            state = weights[f"rm_head.{layer}.weight"] @ state + weights[f"rm_head.{layer}.bias"]
            state = state.relu() if layer < 5 else state
    return state.tolist()


def test_equals_one_image_at_a_time(folders, images):
    expected = [naive(folders, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    means, logs = np.array(expected).T
    assert np.ptp(means) > 0.02
    for batch_size in (1, 3, 4):
        output = make(folders, batch_size=batch_size)(images, SCENES)
        np.testing.assert_allclose(output.scores, means, atol=1e-5)
        np.testing.assert_allclose(output.parts["sigma"], np.exp(logs), atol=1e-5)
    assert output.scores.dtype == np.float32 and output.words == [[]] * 4


def test_image_and_prompt_count(folders, images):
    one = make(folders)(images[:2], SCENES[:2]).scores
    assert make(folders)(images[[1, 1]], SCENES[:2]).scores[0] != one[0]
    assert make(folders)(images[:2], SCENES[1::-1]).scores[0] != one[0]


def test_loaded_once_and_in_half_precision(folders, images):
    loaded = make(folders).load()
    assert make(folders, dtype="float32").load() is loaded  # auto on the CPU
    half = make(folders, dtype="bfloat16")
    assert half.load().backbone.dtype == torch.bfloat16 and half.load().head[0].weight.dtype == torch.float32
    scores = make(folders)(images[:2], SCENES[:2]).scores
    np.testing.assert_allclose(half(images[:2], SCENES[:2]).scores, scores, atol=0.02)


def test_the_names_of_todays_transformers(folders, images, tmp_path):
    weights = load_file(folders[0] / hps.WEIGHTS)
    today = {}
    for key, weight in weights.items():
        if key.startswith("visual."):
            key = f"model.{key}"
        elif key.startswith("model."):
            key = key.replace("model.", "model.language_model.", 1)
        today[key] = weight
    assert today.keys() != weights.keys()
    save_file(today, tmp_path / hps.WEIGHTS)
    scores = make((tmp_path, folders[1]))(images[:2], SCENES[:2]).scores
    np.testing.assert_array_equal(scores, make(folders)(images[:2], SCENES[:2]).scores)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (64, 64, (448, 448)),
        (448, 448, (448, 448)),
        (512, 512, (448, 448)),
        (64, 128, (336, 644)),
        (1024, 512, (616, 308)),
        (16, 3200, (56, 6356)),
    ],
)
def test_sizes(height, width, expected):
    """Enlarged sides are rounded up and reduced ones down, to multiples of 28."""
    assert hps.target_size(height, width) == expected


def test_a_prompt_with_the_models_marks(folders, images):
    with pytest.raises(
        ValueError, match=r"the prompt of scene 1 holds '<\|', which starts the model's marks: 'a <\|Rew"
    ):
        make(folders)(images[:2], [SCENES[0], SimpleNamespace(prompt="a <|Reward|>")])


class TestCheckpointsThatAreNotWhole:
    @pytest.mark.parametrize(
        "missing", ["rm_head.3.bias", "visual.blocks.1.norm1.weight", "model.layers.0.mlp.up_proj"]
    )
    def test_missing_weights(self, folders, tmp_path, missing):
        weights = load_file(folders[0] / hps.WEIGHTS)
        save_file({key: weight for key, weight in weights.items() if missing not in key}, tmp_path / hps.WEIGHTS)
        name = missing.replace("model.", "language_model.")
        with pytest.raises(OSError, match=f"is not a whole HPSv3 checkpoint: it lacks 1 weights, such as {name}"):
            make((tmp_path, folders[1])).load()

    def test_no_weights(self, folders, tmp_path):
        with pytest.raises(OSError, match=rf"HPSv3 checkpoint '{tmp_path}': the folder needs HPSv3\.safetensors"):
            make((tmp_path, folders[1])).load()

    def test_another_base(self, folders, tmp_path):
        shutil.copytree(folders[1], tmp_path, dirs_exist_ok=True)
        config = Qwen2VLConfig.from_pretrained(tmp_path)
        config.text_config.intermediate_size = 48
        config.save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"made from the Qwen2-VL that `base` names.*mismatch"):
            make((folders[0], tmp_path)).load()

    def test_a_base_of_another_kind(self, folders, tmp_path):
        with pytest.raises(OSError, match=r"the tokenizer's files and preprocessor_config\.json of Qwen2-VL .*git"):
            make((folders[0], save_tiny_git(tmp_path))).load()
