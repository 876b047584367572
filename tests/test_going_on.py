"""Scripts that are stopped or killed go on, and come to the same in the end."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_examples import COMPARE, EXAMPLES, TINY, command, module, refused, run, variables, weights  # noqa: F401 (a fixture)
from test_save_load import same

from agents import CheckpointEvery, Checkpoints, StopAfter

IMAGES = 64  # 16 updates


def stopped(signal_number, progress, *words):
    """Run a script until a file of its own says that it is on its way, then send it a signal; its exit status."""
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables()
    )
    deadline = time.monotonic() + 60
    while not progress():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


def updates_saved(folder):
    """Whether two updates have been saved there, and the last one has not."""
    paths = sorted(path.name for path in folder.glob("checkpoint-*"))
    return bool(paths) and int(paths[-1][-8:]) in range(2, IMAGES // 4 - 1)


@pytest.fixture(scope="module")
def options(weights):  # noqa: F811
    """Of train.py, for an agent whose rewards, all equal, are not all that moves it."""
    common = [*weights, *TINY, "--images", IMAGES, "--eval-prompts", 2, "--eval-every", 4, "--save-every", 1]
    return [*common, "--agent", "vmr+panw+mp", "--split", 1, "--entropy-coef", 0.1, "--schedule", "linear"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("train") / "whole"
    run("train", *options, "--out", out)
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_training_goes_on(number, options, whole, tmp_path):
    out = tmp_path / "stopped"
    status = stopped(number, lambda: updates_saved(out / "checkpoints"), "train", *options, "--out", out)
    assert status == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    again = ["--device", "cpu", "--images", IMAGES, "--eval-prompts", 2, "--eval-every", 4]
    run("train", *again, "--out", out, "--resume")
    for name in ("policy", "best"):
        assert same(*(load_file(folder / f"{name}.safetensors") for folder in (whole, out)))
    curves = [EventAccumulator(str(folder)).Reload().Scalars("train/loss") for folder in (whole, out)]
    assert [(event.step, event.value) for event in curves[0]] == [(event.step, event.value) for event in curves[1]]


def test_a_comparison_that_is_killed_goes_on(weights, tmp_path, capsys):  # noqa: F811
    options = [*weights, *COMPARE, "--images", IMAGES, "--save-every", 1, "--agents", "grpo", "vmr+panw+mp"]
    run("compare", *options, "--out", tmp_path / "whole")
    out = tmp_path / "killed"
    second = out / "vmr+panw+mp" / "seed0"
    killed = stopped(signal.SIGKILL, lambda: updates_saved(second / "checkpoints"), "compare", *options, "--out", out)
    assert killed == -signal.SIGKILL and not (second / "result.json").exists()
    run("compare", *options, "--out", out)
    told = capsys.readouterr().err
    assert "grpo, seed 0: finished earlier" in told and "vmr+panw+mp, seed 0: goes on after update" in told
    results = [json.loads((folder / "results.json").read_text())["runs"] for folder in (tmp_path / "whole", out)]
    for whole, mine in zip(*results, strict=True):
        assert whole["prompts"] == mine["prompts"] and whole["budget"]["tokens"] == mine["budget"]["tokens"]
    logs = [(folder / "vmr+panw+mp" / "seed0" / "progress.csv").read_text() for folder in (tmp_path / "whole", out)]
    rows = [list(csv.DictReader(log.splitlines())) for log in logs]
    for name in ("budget/images", "train/loss", "eval/reward"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    assert not (second / "checkpoints").exists()  # it is finished


def test_a_run_goes_on_with_its_own_settings_only(weights, module, tmp_path):  # noqa: F811
    runs = module("runs")

    def comparison(alpha):
        options = [*weights, *COMPARE, "--agents", "panw", "--alpha", alpha, "--out", tmp_path]
        return runs.Comparison(module("compare").parse([str(option) for option in options]))

    def start(alpha):
        found = comparison(alpha)
        return found.start(found.cell("panw", 0), tmp_path / "run", Checkpoints(tmp_path / "run" / "checkpoints"))

    agent, step = start(0.8)
    assert step is None
    agent.set_logger(Logger(None, []))
    agent.learn(10**6, [CheckpointEvery(tmp_path / "run" / "checkpoints", 1), StopAfter(updates=1)])
    agent, step = start(0.8)
    assert (agent.n_updates, step) == (1, agent.images_decoded)
    with pytest.raises(ValueError, match=r"holds a run with alpha=0.8, and now it is 1.2: choose another --out"):
        start(1.2)
    assert Checkpoints(tmp_path / "run" / "checkpoints").paths()  # nothing is lost


def test_the_soak_kills_agents(tmp_path):
    names = ["grpo", "vmr+panw+mp"]
    found = soak("--agents", *names, "--kills", 3, "--updates", 5, "--growth", 10**6, "--out", tmp_path)
    assert [(row["agent"], row["kills"], row["same"]) for row in found["killed"]] == [(name, 3, True) for name in names]
    assert found["memory"]["MiB after 4 updates"] > 0


@pytest.mark.soak
def test_the_soak_kills_every_agent_ten_times(tmp_path):
    found = soak("--kills", 10, "--updates", 120, "--out", tmp_path)
    assert len(found["killed"]) >= 19 and all(row["kills"] == 10 and row["same"] for row in found["killed"])
    assert sum(row["while_writing"] for row in found["killed"]) > 0
    assert found["memory"]["MiB that it grew after the first 100"] < 16


def soak(*options):
    """What examples/soak_training.py found. It forks, which is safe in a young process only."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "soak_training.py"), *map(str, options)],
        capture_output=True,
        text=True,
        env=variables(),
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((Path(options[-1]) / "training.json").read_text())


def test_a_comparison_is_one_process(weights, module, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module("runs"), "current", lambda: SimpleNamespace(count=2))
    options = [*weights, *COMPARE, "--agents", "grpo", "--out", tmp_path]
    assert "a comparison is one process: many runs at a time take --ray" in refused(module("compare").main, *options)


def test_a_run_that_cannot_be_written_is_left_out(weights, module, tmp_path, capsys):  # noqa: F811
    (tmp_path / "grpo").write_text("a file in its place")
    options = [*weights, *COMPARE, "--agents", "grpo", "--out", tmp_path]
    assert module("compare").main([str(option) for option in options]) == 1
    assert "grpo, seed 0 failed and is left out" in capsys.readouterr().err
