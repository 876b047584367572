"""What an agent is on disk, whichever way it was written, and files of earlier versions."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny import assert_same, tiny_envs, weights_of

import agents
from agents import resume

SAVED = Path(__file__).parent / "data" / "saved"  # PANW(VMR) after three updates, written by version 0.1 in both ways
FOLDER, ZIP = SAVED / "checkpoint-00000003", SAVED / "agent.zip"
READERS = {FOLDER: resume.load, ZIP: agents.load}


def digest(module):
    """The SHA-256 of a module's weights."""
    found = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        found.update(name.encode() + weight.contiguous().numpy().tobytes())
    return found.hexdigest()


def read(path, reward):
    agent = READERS[path](path, device="cpu")
    agent.set_env(tiny_envs({"tokenizer": agent.policy.tokenizer, "reward": reward}))
    return agent


class TestFilesOfBefore:
    @pytest.mark.parametrize("path", READERS, ids=lambda path: path.name)
    def test_are_the_agent_that_was_saved_and_draw_what_it_drew_next(self, path, reward):
        expected = json.loads((SAVED / "expected.json").read_text())
        agent = read(path, reward)
        assert (str(agent), agent.n_updates, agent.images_decoded) == tuple(
            expected[name] for name in ("agent", "updates", "images")
        )
        assert {name: digest(getattr(agent, name)) for name in expected["weights"]} == expected["weights"]
        rollout = agent.sample()
        assert [scene.prompt for scene in rollout.scenes] == expected["prompts"]
        # Drawn on another machine: equal unless one of 168 random numbers falls within a rounding of a boundary.
        assert [grid.flatten().tolist() for grid in rollout.grids] == expected["tokens"]

    def test_go_on_alike(self, reward):
        zipped, folder = (
            read(path, reward).learn(1, reset_num_timesteps=False).learn(1, reset_num_timesteps=False)
            for path in (ZIP, FOLDER)
        )
        assert zipped.n_updates == folder.n_updates > 3
        for name in ("policy", "reference", "ema"):
            left, right = weights_of(getattr(zipped, name)), weights_of(getattr(folder, name))
            assert_same(left, right, atol=0, rtol=0)
        assert torch.equal(zipped.generator.get_state(), folder.generator.get_state())
        assert digest(zipped.policy) != json.loads((SAVED / "expected.json").read_text())["weights"]["policy"]
