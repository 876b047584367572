"""The loading of models, and what all rewards by model have in common."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_clip import save_tiny_clip

import rewards
from rewards import hub

ROOT = Path(__file__).parent.parent
NAMES = ["clip", "preference", "hps", "git", "grounding_dino"]
CLASSES = "CLIPModel", "CLIPProcessor"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_clip(tmp_path_factory.mktemp("clip")))


def test_loaded_once(checkpoint):
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: hub.load(*CLASSES, checkpoint, device="cpu")[0], range(4)))
    assert len({id(model) for model in models}) == 1
    assert not models[0].training
    other, _ = hub.load(*CLASSES, checkpoint, device="cpu", dtype="bfloat16")
    assert other is not models[0] and other.dtype == torch.bfloat16
    auto, _ = hub.load(*CLASSES, checkpoint, device="cpu", dtype="auto")
    assert auto is models[0]  # float32 on the CPU


def test_half_precision_is_for_other_devices():
    assert hub.place("cpu", "auto") == ("cpu", "float32")
    assert hub.place("cuda:1", "auto") == ("cuda:1", "bfloat16")
    assert hub.place("cpu", "float16") == ("cpu", "float16")
    assert hub.place("auto", "float32")[0] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_loading_draws_no_random_numbers(tmp_path):
    folder = str(save_tiny_clip(tmp_path))
    state = torch.get_rng_state()
    hub.load(*CLASSES, folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_processor_of_another_checkpoint(checkpoint, tmp_path):
    hub.load(*CLASSES, checkpoint, device="cpu")[0].save_pretrained(tmp_path)
    model, processor = hub.load(*CLASSES, str(tmp_path), checkpoint, device="cpu")
    assert model.config.projection_dim == 4 and processor.tokenizer.eos_token == "<|endoftext|>"
    with pytest.raises(OSError, match=f"cannot load the CLIP checkpoint '{tmp_path / 'none'}': fetch it with"):
        hub.load(*CLASSES, checkpoint, str(tmp_path / "none"))


@pytest.mark.parametrize("name", NAMES)
class TestEveryReward:
    def test_bad_options(self, name):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            rewards.make(name, batch_size=0)
        with pytest.raises(ValueError, match="unknown dtype 'half'; choose one of auto, float32, bfloat16, float16"):
            rewards.make(name, dtype="half")

    def test_scenes(self, name):
        """Checked before anything is loaded."""
        reward = rewards.make(name, model="nobody/has-this")
        images = np.zeros((2, 32, 32, 3), np.uint8)
        wanted = "`.objects`" if name == "grounding_dino" else "`.prompt`"
        with pytest.raises(ValueError, match=f"scene 1 .* needs {wanted}"):
            reward(images, [SimpleNamespace(prompt="a", objects=["a"]), SimpleNamespace(words=("RUN",))])
        with pytest.raises(ValueError, match="got 1 scenes for 2 images"):
            reward(images, [SimpleNamespace(prompt="a", objects=["a"])])
        with pytest.raises(ValueError, match="multiply by 255"):
            reward(images / 255.0, [SimpleNamespace(prompt="a", objects=["a"])] * 2)


def test_without_weights(tmp_path):
    """One process for all: making them imports nothing heavy, and loading says which checkpoint to fetch."""
    code = f"""
import sys, rewards
made = [rewards.make(name) for name in {NAMES}]
assert not {{"torch", "transformers"}} & set(sys.modules), "imported too early"
for reward in made:
    try:
        reward.load()
    except OSError as error:
        print(error)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=True)
    lines = done.stdout.splitlines()
    checkpoints = [
        "openai/clip-vit-base-patch32",
        "yuvalkirstain/PickScore_v1",
        "MizzenAI/HPSv3",
        "microsoft/git-large-vqav2",
        "IDEA-Research/grounding-dino-tiny",
    ]
    assert len(lines) == len(checkpoints)
    assert lines[0].startswith("cannot load the CLIP checkpoint ")
    for line, checkpoint in zip(lines, checkpoints, strict=True):
        assert f"checkpoint '{checkpoint}': fetch it with `hf download {checkpoint}`, or give a local folder" in line
