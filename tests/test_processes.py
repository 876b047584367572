"""Several processes learn what one would: started by ``accelerate launch``, on CPUs, with gloo."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch
from safetensors.torch import load_file

from agents import Checkpoints, load
from agents.common import processes
from agents.sampling import SharedNoise

HERE = Path(__file__).parent
SHARDED = ("grpo", "vmr+panw+mp", "ppo", "stage", "epochs", "temperatures", "raft", "grpo:stopped")


def launch(out, cases, *options):
    """Two processes; returns what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(port), *options, str(HERE / "together.py"), str(out), *cases]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes learned, each case from the same weights: their folder."""
    out = tmp_path_factory.mktemp("two")
    launch(out, [*together.CASES, "grpo:stopped"], "--multi_gpu")
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same with FSDP."""
    out = tmp_path_factory.mktemp("sharded")
    launch(out, SHARDED, "--use_fsdp", "--fsdp_version", "2")
    return out


def close(found, expected):
    """The same numbers to 1e-5, in all of them."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def check(folder, case):
    agent = together.trained(case)
    expected = together.weights(agent)
    start = together.weights(together.an_agent(case))
    assert case == "best_of_n" or any(not torch.equal(start[name], weight) for name, weight in expected.items())
    expected["budget"] = torch.tensor([agent.images_decoded, agent.tokens_sampled, agent.num_timesteps])
    for rank in range(2):
        close(load_file(folder / f"{case}-{rank}.safetensors"), expected)


@pytest.mark.parametrize("case", together.CASES)
def test_two_processes_learn_what_one_does(two, case):
    check(two, case)


@pytest.mark.parametrize("case", [case for case in SHARDED if ":" not in case])
def test_sharded_weights_learn_the_same(sharded, case):
    check(sharded, case)


@pytest.mark.parametrize("kind", ["two", "sharded"])
class TestOneOfEach:
    def test_one_checkpoint_goes_on_with_another_number_of_processes(self, kind, request):
        folder = request.getfixturevalue(kind)
        assert Checkpoints(folder / "checkpoints").paths()[0].name == "checkpoint-00000002"
        agent = Checkpoints(folder / "checkpoints").load(lambda agent: together.envs(4), "cpu")
        assert agent.n_updates == together.UPDATES - 1
        agent.learn(10**6, together.StopAfter(updates=together.UPDATES), reset_num_timesteps=False)
        close(together.weights(agent), together.weights(together.trained("grpo")))

    def test_one_logger(self, kind, request):
        folder = request.getfixturevalue(kind)
        logs = folder / "logs"
        assert len(list(logs.glob("events.*"))) == 1
        with open(logs / "progress.csv") as file:
            rows = list(csv.DictReader(file))
        alone = together.an_agent("grpo")
        seen = []
        alone.logger.dump = lambda step: seen.append(dict(alone.logger.name_to_value))
        alone.learn(10**6, together.StopAfter(updates=together.UPDATES - 1))
        for name in (
            "rollout/reward",
            "rollout/reward_std",
            "train/loss",
            "train/entropy",
            "train/kl",
            "train/ratio_max",
        ):
            assert float(rows[0][name]) == pytest.approx(seen[0][name], abs=1e-5), name
        for name in ("scale/entropy_3_4x4", "scale/loss_share_1_1x1", "train/grad_norm", "rollout/mean"):
            assert float(rows[0][name]) == pytest.approx(seen[0][name], abs=1e-5), name

    def test_the_zip_holds_whole_weights(self, kind, request):
        folder = request.getfixturevalue(kind)
        agent = load(folder / "agent.zip", device="cpu")
        found = load_file(folder / "grpo-stopped-0.safetensors")
        assert all(torch.equal(found[name], weight) for name, weight in together.weights(agent).items())


def test_alone_everything_is_ones_own():
    one = processes.Processes()
    rows = torch.arange(6).view(3, 2)
    assert one.gather(rows) is rows and torch.equal(one.mine(rows, 3), rows)
    assert one.reduce([1.0, 2.0], "max") == [1.0, 2.0] and one.share(8, "P") == 8 and one.is_first


def test_prompts_that_cannot_be_shared():
    two = processes.Processes.__new__(processes.Processes)
    two.count = 2
    with pytest.raises(ValueError, match=r"prompts_per_update=3 cannot be shared among 2 processes: choose a multiple"):
        two.share(3, "prompts_per_update")


def test_the_noise_of_all_is_that_of_one():
    def generator():
        return torch.Generator().manual_seed(3)

    whole = torch.rand(6, 5, generator=generator())
    parts = [SharedNoise(generator(), rank, 3).uniform(2, 5) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    own = [torch.rand(4, generator=SharedNoise(generator(), rank, 3).own()) for rank in range(3)]
    assert not torch.equal(own[0], own[1]) and torch.equal(
        own[0], torch.rand(4, generator=SharedNoise(generator(), 0, 3).own())
    )


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="agents do not run in DeepSpeed's engine: use FSDP"):
        processes.current.__wrapped__()


def test_without_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"several processes need accelerate: pip install .vartext\[distributed\]"):
        processes.current.__wrapped__()
