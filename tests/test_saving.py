"""What an agent is on disk, whichever way it was written, and files of earlier versions."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny import STEPS_A_ROLLOUT, assert_same, tiny_agent, tiny_envs, weights_of

import agents
import agents.saving.stored
from agents import PANW, VMR, checkpoint, resume, stored
from agents.restorable import rebuild

SAVED = Path(__file__).parent / "data" / "saved"  # PANW(VMR) after three updates, written by version 0.1 in both ways
FOLDER, ZIP = SAVED / "checkpoint-00000003", SAVED / "agent.zip"


def digest(module):
    """The SHA-256 of a module's weights."""
    found = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        found.update(name.encode() + weight.contiguous().numpy().tobytes())
    return found.hexdigest()


def read(path, reward):
    agent = agents.load(path, device="cpu")
    agent.set_env(tiny_envs({"tokenizer": agent.policy.tokenizer, "reward": reward}))
    return agent


class TestFilesOfBefore:
    @pytest.mark.parametrize("path", [FOLDER, ZIP], ids=lambda path: path.name)
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


def test_parts_are_what_an_agent_is_put_together_from(parts):
    agent = PANW(tiny_agent(parts, VMR, split=2, learning_rate=1e-3, kl_coef=0.1), alpha=0.8)
    saved = agent.learn(STEPS_A_ROLLOUT).parts()
    assert (saved.agent, saved.wrappers) == (VMR, [(PANW, {"alpha": 0.8})])
    assert saved.modules.keys() == {"policy", "reference", "tokenizer"} and saved.states.keys() == {"optimizer"}
    again = rebuild(copy.deepcopy(saved), tiny_envs(parts), "cpu", {"alpha": 0.5})
    assert str(again) == str(agent).replace("0.8", "0.5") and saved.wrappers == [(PANW, {"alpha": 0.8})]
    assert again.n_updates == agent.n_updates and torch.equal(again.generator.get_state(), agent.generator.get_state())
    assert_same(weights_of(again.policy), weights_of(agent.policy), atol=0, rtol=0)


def test_names_of_before(parts, tmp_path):
    agent = PANW(tiny_agent(parts))
    resume.write(agent, tmp_path / "checkpoint-00000000")
    resume.verify(tmp_path / "checkpoint-00000000")
    loaded = resume.read(tmp_path / "checkpoint-00000000", tiny_envs(parts), "cpu", {})
    left, right = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    assert resume.state_of(loaded, left).keys() == resume.state_of(agent.unwrapped, right).keys()
    assert left.keys() == right.keys() and resume.modules_of(loaded).keys() == {"policy", "reference", "tokenizer"}
    resume.restore_random(loaded, resume.random_states(agent))
    checkpoint.write(agent.unwrapped, tmp_path / "agent.zip", agent._excluded_save_params())
    assert str(checkpoint.load(tmp_path / "agent.zip", device="cpu")) == str(agent)
    assert stored.storable is agents.saving.stored.storable and resume.Checkpoints is agents.Checkpoints
