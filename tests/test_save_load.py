import io
import json
import zipfile

import numpy as np
import pytest
import torch
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

from agents import GRPO, Decoding
from agents.policies.var_text import VARTextPolicy
from var_env import Tokenizer

OPTIONS = {"precision": "auto", "kl_coef": 0.1, "epochs": 2, "minibatches": 2, "learning_rate": 1e-3}
COUNTERS = ("num_timesteps", "images_decoded", "tokens_sampled", "n_updates", "_rollouts")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def optimizer_tensors(agent):
    state = agent.optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


@pytest.fixture
def saved(parts, tmp_path):
    """An agent after one update, and the file it was saved to."""
    agent = tiny_agent(parts, **OPTIONS).learn(STEPS_A_ROLLOUT)
    agent.save(tmp_path / "agent")
    return agent, tmp_path / "agent.zip"


def test_resume_is_bit_for_bit_the_uninterrupted_run(parts, saved):
    whole = tiny_agent(parts, **OPTIONS).learn(2 * STEPS_A_ROLLOUT)
    torch.manual_seed(12345)  # nothing may hang on global state
    resumed = GRPO.load(saved[1], env=tiny_envs(parts), device="cpu")
    resumed.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
    assert same(weights_of(resumed.policy), weights_of(whole.policy))
    assert same(weights_of(resumed.reference), weights_of(whole.reference))
    assert same(optimizer_tensors(resumed), optimizer_tensors(whole))
    assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
    assert [getattr(resumed, name) for name in COUNTERS] == [getattr(whole, name) for name in COUNTERS]


def test_load_restores_settings_counters_and_both_policies(parts, saved):
    agent, path = saved
    loaded = GRPO.load(path, device="cpu")
    assert same(weights_of(loaded.policy), weights_of(agent.policy))
    assert same(weights_of(loaded.reference), weights_of(agent.reference))
    assert not same(weights_of(loaded.policy), weights_of(loaded.reference))
    assert not any(weight.requires_grad for weight in loaded.reference.parameters())
    for name in (*COUNTERS, "group_size", "kl_coef", "epochs", "minibatches", "decoding", "seed"):
        assert getattr(loaded, name) == getattr(agent, name)
    assert loaded.seconds == agent.seconds > 0


def test_a_loaded_agent_predicts_without_an_environment_and_learns_with_one(parts, saved):
    agent, path = saved
    loaded = GRPO.load(path, device="cpu")
    observation, _ = tiny_envs(parts).reset(seed=0)
    expected, _ = agent.predict(observation, deterministic=True)
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], expected)
    with pytest.raises(ValueError, match="no environment"):
        loaded.learn(1)
    loaded.set_env(tiny_envs(parts))
    assert loaded.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False).n_updates == 2


def test_the_zip_holds_plain_data_and_safetensors(saved, tokenizer, tmp_path):
    with zipfile.ZipFile(saved[1]) as archive:
        names = set(archive.namelist())
        assert {"policy.safetensors", "reference.safetensors", "tokenizer.safetensors", "optimizer.pth"} <= names
        assert "policy.pth" not in names
        archive.extractall(tmp_path / "files")
        data = json.loads(archive.read("data"))
    assert not {"policy", "reference", "optimizer", "env", "generator", "callback", "_logger"} & data.keys()
    assert len(archive.namelist()) < 10 and len(json.dumps(data)) < 40_000  # no tensor went in with the settings
    alone = VARTextPolicy.load(tmp_path / "files" / "policy.safetensors", tokenizer=tokenizer)
    assert same(weights_of(alone), weights_of(saved[0].policy))
    assert torch.equal(Tokenizer.load(tmp_path / "files" / "tokenizer.safetensors").codebook, tokenizer.codebook)


def test_settings_can_be_replaced_on_loading(parts, saved):
    loaded = GRPO.load(saved[1], env=tiny_envs(parts), device="cpu", learning_rate=5e-5, decoding=Decoding(top_k=4))
    loaded.learn(STEPS_A_ROLLOUT, reset_num_timesteps=False)
    assert loaded.optimizer.param_groups[0]["lr"] == 5e-5 and loaded.decoding.top_k == 4
    with pytest.raises(ValueError, match="learning_rat"):
        GRPO.load(saved[1], device="cpu", learning_rat=1.0)


def test_without_a_reference(parts, tmp_path):
    agent = tiny_agent(parts, kl_coef=0.0)
    agent.save(tmp_path / "agent.zip")
    assert GRPO.load(tmp_path / "agent.zip", device="cpu").reference is None
    # A KL that is switched on later holds on to the policy as loaded.
    loaded = GRPO.load(tmp_path / "agent.zip", device="cpu", kl_coef=0.1)
    assert same(weights_of(loaded.reference), weights_of(agent.policy))


def test_a_schedule_and_a_file_object(parts):
    agent = tiny_agent(parts, learning_rate=lambda progress: 1e-3 * progress)
    agent.learn(STEPS_A_ROLLOUT)
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    loaded = GRPO.load(file, device="cpu")
    assert same(weights_of(loaded.policy), weights_of(agent.policy)) and loaded.lr_schedule(0.5) == 5e-4


def test_missing_and_damaged_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        GRPO.load(tmp_path / "nowhere.zip")
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"agent\.zip is damaged"):
        GRPO.load(saved[1])
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello", "")
    with pytest.raises(ValueError, match=r"other\.zip is damaged or was not written by"):
        GRPO.load(tmp_path / "other.zip")


def test_a_failing_save_leaves_the_old_file(saved, monkeypatch):
    agent, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(agent.policy, "save", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        agent.save(path)
    assert path.read_bytes() == before


def test_get_and_set_parameters(parts, saved):
    agent, other = saved[0], tiny_agent(parts, policy_seed=9, **OPTIONS)
    other.set_parameters(agent.get_parameters())
    assert same(weights_of(other.policy), weights_of(agent.policy))
    assert same(optimizer_tensors(other), optimizer_tensors(agent))
