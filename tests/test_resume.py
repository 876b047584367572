import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_save_load import optimizer_tensors, same
from tiny import STEPS_A_ROLLOUT, tiny_agent, tiny_envs, weights_of

import agents
from agents import GRPO, PANW, PPO, VMR, CheckpointEvery, Checkpoints, StopAfter, resume
from agents.schedules import WarmupCosine

OPTIONS = {"kl_coef": 0.1, "epochs": 2, "minibatches": 2, "learning_rate": WarmupCosine(1e-3), "ema_decay": 0.7}
WHOLE = 3 * STEPS_A_ROLLOUT


@pytest.fixture
def folder(parts, tmp_path):
    """The checkpoints of a run that was stopped after one update of three."""
    agent = tiny_agent(parts, **OPTIONS)
    agent.learn(WHOLE, [CheckpointEvery(tmp_path / "run", updates=1), StopAfter(updates=1)])
    return tmp_path / "run"


def go_on(folder, parts):
    agent = Checkpoints(folder).load(tiny_envs(parts), "cpu")
    return agent.learn(agent.steps_left, reset_num_timesteps=False)


class TestExact:
    def test_goes_on_bit_for_bit(self, parts, folder):
        whole = tiny_agent(parts, **OPTIONS).learn(WHOLE)
        torch.manual_seed(12345)
        resumed = go_on(folder, parts)
        assert resumed.n_updates == whole.n_updates == 3
        for name in ("policy", "reference", "ema"):
            assert same(weights_of(getattr(resumed, name)), weights_of(getattr(whole, name)))
        assert same(optimizer_tensors(resumed), optimizer_tensors(whole))
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]  # the schedule's place
        assert torch.equal(resumed.generator.get_state(), whole.generator.get_state())
        for name in ("num_timesteps", "images_decoded", "tokens_sampled", "_rollouts", "_total_timesteps"):
            assert getattr(resumed, name) == getattr(whole, name)

    def test_with_a_critic(self, parts, tmp_path):
        whole = tiny_agent(parts, PPO).learn(WHOLE)
        tiny_agent(parts, PPO).learn(WHOLE, [CheckpointEvery(tmp_path, 1), StopAfter(updates=2)])
        resumed = go_on(tmp_path, parts)
        assert same(weights_of(resumed.critic), weights_of(whole.critic)) and resumed.n_updates == 3

    def test_wrappers_and_what_vmr_has_measured(self, parts, tmp_path):
        def an_agent():
            return PANW(tiny_agent(parts, VMR, split="auto"), alpha=0.8)

        steps = an_agent().timesteps(images=64)
        whole = an_agent().learn(steps)
        an_agent().learn(steps, [CheckpointEvery(tmp_path, 1), StopAfter(updates=2)])
        resumed = Checkpoints(tmp_path).load(tiny_envs(parts), "cpu")
        assert str(resumed) == "PANW(VMR(split=auto, suffix_samples=2, eta=1.0), alpha=0.8)"
        resumed.learn(resumed.steps_left, reset_num_timesteps=False)
        assert resumed.split_rule == whole.split_rule and resumed.n_updates == whole.n_updates > 2
        assert same(weights_of(resumed.policy), weights_of(whole.policy))

    def test_the_global_generators_and_the_environments_go_on(self, parts, tmp_path):
        def numbers():
            return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

        agent = tiny_agent(parts).learn(STEPS_A_ROLLOUT)
        Checkpoints(tmp_path).save(agent)
        expected = numbers(), agent.env.reset()[1]["prompt"]
        numbers()
        loaded = Checkpoints(tmp_path).load(lambda agent: tiny_envs(parts, agent.prompts_per_update), "cpu")
        assert (numbers(), loaded.env.reset()[1]["prompt"]) == expected

    def test_settings_can_be_replaced(self, folder, parts):
        loaded = Checkpoints(folder).load(tiny_envs(parts), "cpu", learning_rate=1e-5, kl_coef=0.5)
        assert (loaded.learning_rate, loaded.kl_coef, loaded.epochs) == (1e-5, 0.5, 2)
        with pytest.raises(ValueError, match="unknown setting 'learning_rat'"):
            Checkpoints(folder).load(device="cpu", learning_rat=1.0)


class TestFiles:
    def test_what_is_in_it(self, folder, tokenizer):
        path = Checkpoints(folder).paths()[0]
        assert path.name == "checkpoint-00000001"
        names = {"policy", "reference", "ema", "tokenizer", "state"}
        files = {f"{name}.safetensors" for name in names} | {"state.json", "SHA256SUMS"}
        assert {file.name for file in path.iterdir()} == files  # nothing that is pickled
        state = json.loads((path / "state.json").read_text())
        assert state["agent"] == "GRPO" and state["settings"]["dict"]["learning_rate"] == {
            "WarmupCosine": {"start": 1e-3, "warmup": 0.05, "end": 0.0}
        }
        assert os.system(f"cd {path} && sha256sum -c --quiet SHA256SUMS") == 0

    def test_keeps_the_newest(self, parts, tmp_path):
        tiny_agent(parts).learn(4 * STEPS_A_ROLLOUT, CheckpointEvery(tmp_path, 1, keep=3))
        assert [resume.updates_of(path) for path in Checkpoints(tmp_path).paths()] == [4, 3, 2]
        assert len(list(tmp_path.iterdir())) == 3  # and nothing half-written

    @pytest.mark.parametrize("damage", ["cut", "bit", "missing", "sums", "state"])
    def test_a_damaged_one_is_reported_and_the_one_before_it_used(self, folder, parts, damage):
        newest = Checkpoints(folder).paths()[0]
        file = newest / {"sums": resume.SUMS, "state": "state.json"}.get(damage, "policy.safetensors")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content if damage in ("bit", "state") else content[: len(content) // 2])
        with pytest.warns(UserWarning, match=r"checkpoint-00000001 is damaged.*the one before it is used"):
            agent = Checkpoints(folder).load(tiny_envs(parts), "cpu")
        assert agent.n_updates == 0 and (folder / "damaged-checkpoint-00000001").is_dir()
        whole = tiny_agent(parts, **OPTIONS).learn(WHOLE)
        agent.learn(agent.steps_left, CheckpointEvery(folder, 1), reset_num_timesteps=False)
        assert same(weights_of(agent.policy), weights_of(whole.policy))
        assert [resume.updates_of(path) for path in Checkpoints(folder).paths()] == [3, 2]

    def test_nothing_there_or_nothing_whole(self, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*nowhere"):
            Checkpoints(tmp_path / "nowhere").load()
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
            resume.load(tmp_path / "nowhere")
        for path in Checkpoints(folder).paths():
            (path / "state.json").write_text("{}")
        with pytest.warns(match="is damaged"), pytest.raises(ValueError, match="all checkpoints"):
            Checkpoints(folder).load()

    def test_what_a_killed_writer_left_is_swept_up(self, folder, parts):
        shutil.copytree(Checkpoints(folder).paths()[0], folder / ".1-2-checkpoint-00000002")
        assert Checkpoints(folder).load(device="cpu").n_updates == 1
        assert not list(folder.glob(".*"))

    def test_a_kill_while_one_takes_another_s_place_loses_neither(self, folder, parts):
        newest = Checkpoints(folder).paths()[0]
        newest.rename(folder / f"replaced-{newest.name}")
        assert Checkpoints(folder).load(device="cpu").n_updates == 1
        shutil.copytree(newest, folder / f"replaced-{newest.name}")
        assert Checkpoints(folder).load(device="cpu").n_updates == 1
        assert not list(folder.glob("replaced-*"))

    def test_another_run_in_the_same_folder_is_refused(self, folder, parts):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match=r"checkpoint-00000001 is of another run.*choose another folder"):
            tiny_agent(parts).learn(WHOLE, CheckpointEvery(folder))
        assert sorted(folder.rglob("*")) == before

    def test_wrong_numbers(self, tmp_path):
        for keep in (0, 1.5):
            with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
                Checkpoints(tmp_path, keep)
        with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
            CheckpointEvery(tmp_path, updates=0)


class TestNoCodeFromFiles:
    def test_a_setting_that_is_code_is_refused_in_the_beginning(self, parts, tmp_path):
        agent = tiny_agent(parts, learning_rate=lambda progress: 1e-3)
        with pytest.raises(TypeError, match=r"settings\.learning_rate is <function.*holds no code.*schedules"):
            agent.learn(STEPS_A_ROLLOUT, CheckpointEvery(tmp_path))
        assert agent.n_updates == 0 and not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.update(agent="Popen"), "no agent or wrapper Popen is known here"),
            (lambda state: state["settings"]["dict"].update(x={"Popen": {}}), "unknown stored class 'Popen'"),
            (lambda state: state.update(format=2), "its format is 2"),
            (lambda state: state["states"]["dict"].update(x={"tensor": "none"}), "the tensor 'none' is missing"),
        ],
    )
    def test_classes_are_those_that_are_known(self, folder, change, message):
        path = Checkpoints(folder).paths()[0]
        state = json.loads((path / "state.json").read_text())
        change(state)
        (path / "state.json").write_text(json.dumps(state))
        files = [file for file in sorted(path.iterdir()) if file.name != resume.SUMS]
        (path / resume.SUMS).write_text("".join(f"{resume.digest(file)}  {file.name}\n" for file in files))
        with pytest.raises(ValueError, match=message):
            resume.load(path)

    def test_an_agent_of_another_project(self, parts, tmp_path):
        class Mine(GRPO):
            def __init__(self, policy, env, **grpo):
                super().__init__(policy, env, **grpo)
                self.memory = {"best": np.float32(0.5), 3: (1, torch.ones(2))}  # a state of its own

        Checkpoints(tmp_path).save(tiny_agent(parts, Mine))
        loaded = Checkpoints(tmp_path).load(device="cpu")
        assert type(loaded) is Mine and loaded.memory["best"] == 0.5 and loaded.memory[3][1].tolist() == [1, 1]


def test_a_checkpoint_is_no_zip_and_a_zip_no_checkpoint(folder, parts, tmp_path):
    agents.Checkpoints(folder).load(device="cpu").save(tmp_path / "agent")
    assert agents.load(tmp_path / "agent.zip", device="cpu").n_updates == 1
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        resume.load(Path(tmp_path / "agent.zip"))
