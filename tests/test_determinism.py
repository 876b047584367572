"""One seed, one episode, bit for bit: in one process, in another, and whatever the global generators do."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from var_env import VARTextEnv, VARTextVectorEnv

ROOT = Path(__file__).parent.parent


def digest(parts):
    """A hash of all that a few seeded episodes return."""
    seen = hashlib.sha256()
    envs, env = VARTextVectorEnv(3, **parts), VARTextEnv(**parts)
    for episode in range(2):
        seed = 11 if episode == 0 else None
        seen.update(repr((envs.reset(seed=seed)[1], env.reset(seed=seed)[1])).encode())
        rng = np.random.default_rng(episode)
        for grid in envs.schedule.grids:
            action = rng.integers(32, size=(3, *grid))
            for observation, reward, *_, info in (envs.step(action), env.step(action[0])):
                seen.update(observation["tokens"].tobytes() + observation["prompt"].tobytes())
                seen.update(np.asarray(reward).tobytes() + np.asarray(info.get("image", 0)).tobytes())
    return seen.hexdigest()


def test_same_seed_same_episode(parts):
    assert digest(parts) == digest(parts)


def test_same_seed_same_episode_in_another_process(parts, tmp_path):
    parts["tokenizer"].save(tmp_path / "tokenizer.safetensors")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from conftest import Brightness\n"
        "from test_determinism import digest\n"
        "from var_env import Tokenizer\n"
        f"print(digest({{'tokenizer': Tokenizer.load({str(tmp_path / 'tokenizer.safetensors')!r}), "
        "'reward': Brightness()}))"
    )
    variables = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=ROOT)
    assert run.stdout.strip() == digest(parts), run.stderr


def test_different_seeds_differ(parts):
    env = VARTextEnv(**parts)
    assert len({env.reset(seed=seed)[1]["prompt"] for seed in range(20)}) > 15


def test_the_global_generators_are_neither_read_nor_moved(parts):
    first = digest(parts)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert digest(parts) == first
    assert (np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()) == before  # noqa: NPY002
