"""``--ray``: a comparison in a local Ray of two workers, one of which is killed, and the same one without Ray."""

import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from test_examples import COMPARE, module, refused, weights

import rewards
from agents import recipes

ray = pytest.importorskip("ray")

__all__ = ["module", "weights"]  # fixtures
PLUGIN = '''
import os
import signal
from pathlib import Path

import numpy as np

import rewards
from agents import GRPO, register
from rewards import Reward, RewardOutput


class Shade(Reward):
    name = "shade"

    def score(self, images, scenes):
        shade, count = images.mean((1, 2, 3)).astype(np.float32) / 255, len(images)
        return RewardOutput(shade, {}, [[]] * count, [[]] * count, [np.zeros((0, 4), np.float32)] * count)


rewards.REWARDS["shade"] = f"{__name__}:Shade"


def note(name, agent):
    with (Path(__file__).parent / name).open("a") as file:
        file.write(f"{os.getpid()} {agent.n_updates}\\n")


@register("killed")
class Killed(GRPO):
    """GRPO whose process gets a signal in its third update, once."""

    signal = signal.SIGKILL

    def update(self, *args):
        name = self.signal.name
        first = not (Path(__file__).parent / name).exists()
        note(f"updates-{name}", self)
        if self.n_updates == 2 and first:
            note(name, self)
            os.kill(os.getpid(), self.signal)
        return super().update(*args)


@register("warned")
class Warned(Killed):
    """As a machine that is taken back."""

    signal = signal.SIGTERM


@register("wrong")
class Wrong(GRPO):
    """GRPO with a mistake."""

    def update(self, *args):
        raise ValueError("the loss is wrong")


@register("doomed")
class Doomed(GRPO):
    """GRPO whose process is killed whenever it learns."""

    def update(self, *args):
        note("doomed", self)
        os.kill(os.getpid(), signal.SIGKILL)
'''


@pytest.fixture(scope="module")
def cluster():
    """A local Ray of two workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # or other processes on this machine could fail the tests
        ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the plugin, whose names are forgotten in the end."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "ray_plugin.py").write_text(PLUGIN)
    recipes.known()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.AGENTS, "_entries", dict(recipes.AGENTS))
        patch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
        torch.set_num_threads(1)  # as in the workers, for equal digits
        yield folder
        torch.set_num_threads(threads)
        sys.modules.pop("ray_plugin", None)


@pytest.fixture
def compare(module, weights, folder, monkeypatch):
    """Calls compare.py in the plugin's folder, so that relative paths have to find their way to the workers."""
    monkeypatch.chdir(folder)
    options = [*weights, *COMPARE, "--plugin", "ray_plugin.py", "--reward", "shade", "--save-every", "1"]
    return lambda *more: module("compare").main([*options, *map(str, more)])


def runs_of(out):
    """The runs in results.json, without what may differ: the time."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    for run in runs:
        del run["budget"]["seconds"]
    return runs


def test_a_killed_worker_changes_nothing(cluster, compare, folder, capsys):
    agents = ["--agents", "killed", "vmr"]
    assert compare(*agents, "--out", "with", "--ray", "--ray-retries", 1) == 0
    told = capsys.readouterr()
    updates = [line.split() for line in (folder / "updates-SIGKILL").read_text().splitlines()]
    (first, second) = dict.fromkeys(pid for pid, _ in updates)
    assert [(pid, int(n)) for pid, n in updates] == [(first, 0), (first, 1), (first, 2), (second, 2), (second, 3)]
    assert str(os.getpid()) not in (first, second) and "2/2" in told.err and "left out" not in told.err
    assert compare(*agents, "--out", "without") == 0
    assert capsys.readouterr().out.replace("without", "with") in told.out  # where Ray tells of the killed worker, too
    runs = runs_of(folder / "with")
    assert runs == runs_of(folder / "without") and [run["agent"] for run in runs] == ["killed", "vmr"]
    assert all(run["finished"] and run["budget"]["images"] == 16 for run in runs)
    files = [folder / out / "killed" / "seed0" / "policy.safetensors" for out in ("with", "without")]
    weights_with, weights_without = map(load_file, files)
    assert all(torch.equal(weight, weights_without[name]) for name, weight in weights_with.items())
    assert not list((folder / "with").rglob("checkpoint*")) and not list((folder / "with").rglob(".*"))


def test_a_second_call_needs_no_ray(compare, module, monkeypatch, capsys):
    monkeypatch.setattr(module("ray_runs"), "RayRuns", None)
    assert compare("--agents", "killed", "vmr", "--out", "with", "--ray") == 0
    assert "vmr, seed 0: finished earlier, not trained again" in capsys.readouterr().err


def test_a_worker_that_is_asked_to_stop(cluster, compare, folder):
    assert compare("--agents", "warned", "--out", "warned", "--ray", "--ray-retries", 1) == 0
    updates = [line.split()[1] for line in (folder / "updates-SIGTERM").read_text().splitlines()]
    assert updates == ["0", "1", "2", "3"]  # the third one was finished, and saved
    assert runs_of(folder / "warned")[0]["finished"]


def test_an_error_in_a_run(cluster, compare, folder, capsys):
    assert compare("--agents", "wrong", "--out", "wrong", "--ray") == 1
    assert "wrong, seed 0 failed and is left out: the loss is wrong" in capsys.readouterr().err
    assert runs_of(folder / "wrong") == []


def test_ctrl_c_stops_the_workers_in_good_order(cluster, compare, folder, capsys):
    out = folder / "stopped"

    def press():
        files, deadline = [out / "grpo" / f"seed{seed}" / "progress.csv" for seed in (0, 1)], time.monotonic() + 40
        while time.monotonic() < deadline:
            if all(file.is_file() and file.read_text().count("\n") > 3 for file in files):
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    options = ["--agents", "grpo", "--seeds", 0, 1, 2, "--images", 10**6]
    assert compare(*options, "--out", out, "--ray") == 130
    thread.join()
    told = capsys.readouterr()
    assert "goes on with the runs that are missing" in told.out and "left out" not in told.err
    runs = runs_of(out)
    assert [(run["seed"], run["finished"]) for run in runs] == [(0, False), (1, False)]
    assert all(8 <= run["budget"]["images"] < 10**6 for run in runs)
    assert len(list(out.glob("grpo/seed*/checkpoints/checkpoint-*"))) == 4 and not (out / "grpo" / "seed2").exists()


def test_a_run_that_always_dies_is_left_out(cluster, compare, folder, capsys):
    assert compare("--agents", "vmr", "doomed", "--out", "with", "--ray", "--ray-retries", 1) == 1
    told = capsys.readouterr()
    assert "doomed, seed 0 failed and is left out: its worker was lost, also after --ray-retries 1: " in told.err
    assert "vmr, seed 0: finished earlier" in told.err and "| vmr " in told.out and "doomed" not in told.out
    assert len((folder / "doomed").read_text().splitlines()) == 2
    assert [run["agent"] for run in runs_of(folder / "with")] == ["vmr"]


@pytest.mark.parametrize(
    ("given", "named", "address"),
    [("", None, "local"), ("", "head:6379", "head:6379"), ("ray://other:10001", "head:6379", "ray://other:10001")],
)
def test_addresses(given, named, address, cluster, module, weights, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    monkeypatch.setattr(module("ray_runs"), "require_answer", lambda address: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if named:
        monkeypatch.setenv("RAY_ADDRESS", named)
    args = Namespace(ray=given, ray_cpus=64, ray_gpus=0.25, ray_retries=3, out=tmp_path)
    module("ray_runs").RayRuns(module("runs").Comparison, args, torch.device("cpu"))
    assert asked == [address]
    assert "no machine of this Ray has 64 CPUs and 0.25 GPUs (--ray-cpus, --ray-gpus)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray-gpus", "2"], "--ray-gpus must lie in [0, 1], for a run uses one GPU at most, got 2.0"),
        (["--ray-cpus", "0"], "--ray-cpus must be at least 1, got 0"),
        (["--ray-retries", "-1"], "--ray-retries must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("script", ["compare", "ablate"])
def test_wrong_numbers(script, options, message, module, tmp_path):
    assert refused(module(script).main, "--out", tmp_path, *options, "--ray") == f"error: {message}"


def test_nobody_at_the_address(module, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    message = refused(module("compare").main, *weights, *COMPARE, "--out", tmp_path, "--ray", "127.0.0.1:9")
    assert message.startswith("error: no Ray answers at 127.0.0.1:9 (") and "ray start --head" in message


def test_without_ray(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused(module("compare").main, "--out", tmp_path, "--ray")
    assert message == 'error: --ray needs the package ray: pip install "vartext[ray]", or leave out --ray'
