"""The worked example of docs/your-model.md: the contract on its policy, its training, and its life as a plugin."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agents.policies import load_policy

EXAMPLES = Path(__file__).parents[1] / "examples"


def load():
    spec = importlib.util.spec_from_file_location("own_model", EXAMPLES / "own_model.py")
    sys.modules["own_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


own_model = load()


class TestContract(own_model.TestConvPolicy):
    """As `pytest examples/own_model.py` runs it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    assert own_model.main(["--images", "64", "--out", str(folder)]) == 0
    return folder


def test_it_is_trained_and_kept(trained, capsys):
    assert {path.name for path in trained.iterdir()} >= {"policy.safetensors", "agent.zip"}
    policy = load_policy(trained / "policy.safetensors")
    assert type(policy) is own_model.ConvPolicy
    start = own_model.ConvPolicy(policy.tokenizer)
    assert not np.allclose(policy.head.weight.detach(), start.head.weight.detach())


def test_it_joins_as_a_plugin(trained, tmp_path):
    command = [sys.executable, EXAMPLES / "compare.py", "--plugin", EXAMPLES / "own_model.py"]
    command += ["--policy", trained / "policy.safetensors", "--agents", "grpo", "--images", "8", "--group-size", "2"]
    command += ["--prompts-per-update", "2", "--test-prompts", "2", "--val-prompts", "2", "--out", tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "grpo" / "seed0" / "result.json").read_text())
    assert result["budget"]["images"] == 8


def test_short_enough_to_read():
    assert len((EXAMPLES / "own_model.py").read_text().splitlines()) < 160
