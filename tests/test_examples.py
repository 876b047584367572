"""The example scripts, each run at a tiny size as a user runs it; follow-ups in this process, to save start-up time."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_policy

from agents import GRPO
from rewards import OCRReward, RewardOutput
from var_env import ScaleSchedule, Tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TINY = ["--group-size", "2", "--prompts-per-update", "2", "--images", "16"]
COMPARE = [*TINY, "--test-prompts", "5", "--val-prompts", "2", "--eval-every", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The options that name a small random policy and its tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = Tokenizer(ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16), 32, channels=4, width=8, blocks=1)
    tokenizer.save(folder / "tokenizer.safetensors")
    tiny_policy(tokenizer).save(folder / "policy.safetensors")
    files = {"--policy": "policy.safetensors", "--tokenizer": "tokenizer.safetensors"}
    return [part for option, file in files.items() for part in (option, str(folder / file))] + ["--device", "cpu"]


def command(script, *options):
    return [sys.executable, str(EXAMPLES / f"{script}.py"), *map(str, options)]


def variables(*path):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "OMP_NUM_THREADS": "1"}


def run(script, *options, status=0):
    done = subprocess.run(command(script, *options), capture_output=True, text=True, env=variables(), timeout=120)
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.fixture
def module(monkeypatch):
    """Imports a script."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_module


def refused(main, *options):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as error:
        main([str(option) for option in options])
    return str(error.value)


@pytest.mark.parametrize("script", ["compare", "train", "evaluate", "play", "bench", "sweep"])
def test_help_shows_an_example_and_defaults(script, module, capsys):
    with pytest.raises(SystemExit) as end:
        module(script).parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python examples/{script}.py" in text and "(default: " in text
    assert all(option in text for option in ("--policy", "--tokenizer", "--device"))


def test_a_foreign_package_agents_is_named(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    done = subprocess.run(command("play"), capture_output=True, text=True, env=variables(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the package `agents` that Python finds is")


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """A small comparison: its folder and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, run("compare", *weights, *COMPARE, "--seeds", 0, 1, "--out", out)


class TestCompare:
    def test_results(self, compared):
        out, printed = compared
        results = json.loads((out / "results.json").read_text())
        assert [(r["agent"], r["seed"], r["finished"]) for r in results["runs"]] == [
            ("grpo", 0, True),
            ("grpo", 1, True),
        ]
        assert all(
            r["budget"] | {"seconds": 0} == {"images": 16, "tokens": 336, "updates": 4, "seconds": 0}
            for r in results["runs"]
        )
        assert len(results["base"]["prompts"]["prompt"]) == 5
        for metric in ("reward", "word_accuracy", "ned", "nothing_read"):
            scores = [np.array(r["prompts"][metric]) for r in (results["base"], *results["runs"])]
            assert all(len(values) == 5 for values in scores)
            summary = results["summary"]["grpo"][metric]
            mean, low, high = summary["difference"]
            assert mean == pytest.approx(((scores[1] + scores[2]) / 2 - scores[0]).mean())
            assert low <= mean <= high
        assert results["settings"]["versions"]["torch"] == torch.__version__
        table = [line for line in printed.splitlines() if line.startswith("|")]
        assert len(table) == 2 + 4 * 2
        assert "\n".join(table) in (out / "results.md").read_text()

    def test_tensorboard(self, compared):
        for seed in (0, 1):
            events = EventAccumulator(str(compared[0] / "grpo" / f"seed{seed}"), {"images": 0, "tensors": 0}).Reload()
            tags = events.Tags()
            scalars = {"rollout/reward", "rollout/word_accuracy", "train/loss", "eval/word_accuracy", "budget/images"}
            assert scalars <= set(tags["scalars"])
            assert [event.value for event in events.Scalars("budget/images")] == [4, 8, 12, 16]
            assert [event.value for event in events.Scalars("eval/images")] == [0, 8, 16]
            assert "samples/images" in tags["images"] and "samples/read/text_summary" in tags["tensors"]

    def test_pictures(self, compared):
        sheet = Image.open(compared[0] / "before_after.png")
        strips = [Image.open(compared[0] / name / "samples.png") for name in ("base", "grpo/seed0")]
        assert sheet.width == strips[0].width and sheet.height > strips[0].height + strips[1].height
        curves = np.asarray(Image.open(compared[0] / "curves.png").convert("RGB"), int)
        blue = np.abs(curves - (31, 119, 180)).sum(-1) < 30  # the first agent's lines
        assert blue.sum() > 500

    def test_a_rerun_trains_what_is_missing_and_gets_the_same(self, compared, weights, module, capsys):
        out, printed = compared
        lost, kept = out / "grpo" / "seed1" / "result.json", out / "grpo" / "seed0" / "result.json"
        before, written = json.loads(lost.read_text()), kept.stat().st_mtime_ns
        lost.unlink()
        options = [*weights, *COMPARE, "--seeds", "0", "1", "--out", str(out)]
        assert module("compare").main(options) == 0
        told = capsys.readouterr()
        assert "grpo, seed 0: finished earlier" in told.err and "base: evaluating" not in told.err
        assert told.out == printed and kept.stat().st_mtime_ns == written
        again = json.loads(lost.read_text())
        assert again["prompts"] == before["prompts"] and again["metrics"] == before["metrics"]
        assert len(list(lost.parent.glob("events*"))) == 1

    def test_other_settings_need_another_folder(self, compared, weights, module):
        options = [*weights, *COMPARE, "--learning-rate", "3e-5", "--out", compared[0]]
        message = refused(module("compare").main, *options)
        assert "learning_rate=5e-05, and now it is 3e-05" in message and "--out" in message

    def test_a_cap_on_the_time(self, weights, module, tmp_path, capsys):
        options = [*weights, *COMPARE, "--images", "4000", "--seconds", "0.01", "--out", str(tmp_path)]
        assert module("compare").main(options) == 0
        run = json.loads((tmp_path / "results.json").read_text())["runs"][0]
        assert run["finished"] and run["budget"]["images"] < 100
        assert "stopped at" in capsys.readouterr().err

    def test_a_run_that_fails_is_left_out(self, weights, module, tmp_path, monkeypatch, capsys):
        compare = module("compare")
        monkeypatch.setattr(GRPO, "update", lambda *_: (_ for _ in ()).throw(RuntimeError("the loss is nan")))
        assert compare.main([*weights, *COMPARE, "--out", str(tmp_path)]) == 1
        assert "grpo, seed 0 failed and is left out: the loss is nan" in capsys.readouterr().err
        assert json.loads((tmp_path / "results.json").read_text())["runs"] == []

    def test_ctrl_c_leaves_usable_results(self, weights, tmp_path):
        options = [*weights, *COMPARE, "--images", 10**6, "--seeds", 0, 1, "--out", tmp_path]
        process = subprocess.Popen(
            command("compare", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables()
        )
        progress, deadline = tmp_path / "grpo" / "seed0" / "progress.csv", time.monotonic() + 60
        while not (progress.is_file() and len(progress.read_text().splitlines()) > 3):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert "Ctrl-C: finishing this update" in told and "Interrupted" in printed
        (only,) = json.loads((tmp_path / "results.json").read_text())["runs"]
        assert not only["finished"] and 8 <= only["budget"]["images"] < 10**6
        assert len(only["prompts"]["reward"]) == 5
        assert "interrupted" in (tmp_path / "results.md").read_text()
        assert (tmp_path / "before_after.png").is_file() and (tmp_path / "curves.png").is_file()

    def test_the_second_ctrl_c_is_immediate(self, module, capsys):
        with module("common").Interrupt("noted") as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert "noted" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """The folder of a small training run."""
    out = tmp_path_factory.mktemp("train")
    run("train", *weights, *TINY, "--eval-prompts", 2, "--clip-range", 0.3, "--top-k", 8, "--out", out)
    return out


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("compare", ["--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        ("compare", ["--kl-coef", "nan"], "--kl-coef must be at least 0, got nan"),
        ("train", ["--save-every", "0"], "--save-every must be at least 1, got 0"),
        ("train", ["--clip-range", "0"], "clip_range and max_grad_norm above 0"),
        ("evaluate", ["--prompts", "0"], "--prompts must be at least 1, got 0"),
        ("evaluate", ["--top-p", "2"], "top_p must lie in (0, 1], got 2.0"),
        ("evaluate", ["--regions", "1:0.5"], "probabilities that sum to 1"),
        ("play", ["--device", "gpu"], "gpu"),
    ],
)
def test_wrong_numbers(script, options, message, weights, module, tmp_path):
    out = [] if script == "play" else ["--out", tmp_path]
    assert message in refused(module(script).main, *weights, *out, *options)


class TestTrain:
    def test_files(self, trained):
        agent = GRPO.load(trained / "agent.zip", device="cpu")
        assert (agent.images_decoded, agent.n_updates, agent.clip_range, agent.decoding.top_k) == (16, 4, 0.3, 8)
        events = EventAccumulator(str(trained)).Reload()
        assert len(events.Scalars("train/loss")) == 4
        assert (trained / "policy.safetensors").is_file()

    def test_resume(self, trained, module):
        options = ["--device", "cpu", "--eval-prompts", "2", "--out", trained]
        assert "go on from it with --resume" in refused(module("train").main, *options)
        assert "leave out --resume" in refused(module("train").main, "--resume", "--out", trained / "nowhere")
        more = [*map(str, options), "--resume", "--images", "24", "--learning-rate", "3e-5"]
        assert module("train").main(more) == 0
        agent = GRPO.load(trained / "agent.zip", device="cpu")
        assert (agent.images_decoded, agent.learning_rate, agent.clip_range, agent.decoding.top_k) == (24, 3e-5, 0.3, 8)
        assert module("train").main(more) == 0  # nothing left to do

    def test_a_reward_that_is_not_finite(self, weights, module, tmp_path, monkeypatch):
        score, calls = OCRReward.score, []

        def fail_later(self, images, scenes):
            calls.append(len(images))
            if len(calls) > 4:
                return RewardOutput(np.full(len(images), np.nan, np.float32))
            return score(self, images, scenes)

        monkeypatch.setattr(OCRReward, "score", fail_later)
        options = [*weights, *TINY, "--eval-prompts", 2, "--save-every", 1, "--out", tmp_path]
        message = refused(module("train").main, *options)
        assert "nan" in message and "agent.zip holds the last checkpoint, intact" in message
        assert GRPO.load(tmp_path / "agent.zip", device="cpu").n_updates > 0


class TestEvaluate:
    def test_an_agent(self, weights, module, tmp_path, capsys):
        assert module("train").main([*weights, *TINY, "--eval-prompts", "2", "--out", str(tmp_path)]) == 0
        capsys.readouterr()
        agent = ["--policy", str(tmp_path / "agent.zip"), "--device", "cpu"]
        assert module("evaluate").main([*agent, "--prompts", "3", "--out", str(tmp_path)]) == 0
        assert "| Word Accuracy " in capsys.readouterr().out
        evaluation = json.loads((tmp_path / "evaluation.json").read_text())
        assert len(evaluation["prompts"]["ned"]) == 3 and len(evaluation["metrics"]["reward"]) == 3
        assert Image.open(tmp_path / "samples.png").width > 0
        message = refused(module("evaluate").main, *agent, "--tokenizer", "other")
        assert "holds its own tokenizer" in message

    def test_gates_of_random_weights(self, weights):
        printed = run("evaluate", *weights, "--gates", "--prompts", 3, status=1)
        lines = [line for line in printed.splitlines() if "policy: word accuracy" in line]
        assert len(lines) == 1 and "0.35 to 0.7" in lines[0] and "FAIL" in lines[0]

    @pytest.mark.parametrize(("copy", "share"), [(lambda images: images, 1.0), (np.zeros_like, 0.0)])
    def test_the_tokenizer_gate(self, weights, module, monkeypatch, copy, share):
        script = module("evaluate")
        args = script.parse(weights)
        env = script.make_env(script.load_policy(args))
        monkeypatch.setattr(script, "reconstruct", lambda env, images: copy(images))
        measured, readable = script.tokenizer_gate(env, script.held_out_scenes(env.world, 3))
        assert measured == share and readable >= 3

    def test_wrong_files(self, module, tmp_path):
        main = module("evaluate").main
        assert "no agent at" in refused(main, "--policy", tmp_path / "none.zip")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"nothing")
        assert str(broken) in refused(main, "--policy", broken, "--tokenizer", broken)


class TestPlay:
    def test_pictures_grow(self, weights, tmp_path):
        prompt = 'A navy sign that says "HELLO" in yellow letters'
        files = ["--png", tmp_path / "a" / "p.png", "--gif", tmp_path / "p.gif"]
        printed = run("play", *weights, prompt, "--seed", 1, "--columns", 8, *files)
        assert printed.startswith(prompt) and "OCR read " in printed and "score -0.6" in printed
        assert printed.count("▀") == 3 * 8 * 4
        gif = Image.open(tmp_path / "p.gif")
        assert gif.n_frames == 3
        png = Image.open(tmp_path / "a" / "p.png")
        assert png.width > 2 * png.height

    def test_quiet_on_a_held_out_prompt(self, weights, module, capsys):
        assert module("play").main([*weights, "--seed", "3", "--quiet"]) == 0
        first, last = capsys.readouterr().out.splitlines()
        assert '"' in first and last.startswith("OCR read")

    def test_half_blocks(self, module):
        image = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
        assert module("play").half_blocks(image, 2) == (
            "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀\x1b[38;2;0;255;0m\x1b[48;2;9;9;9m▀\x1b[0m"
        )

    def test_a_prompt_without_words(self, weights, module):
        assert "names no word in double quotes" in refused(module("play").main, "A sign", *weights)


class TestSweep:
    def test_rows_of_a_grid(self, weights, tmp_path):
        small = [*TINY[:4], "--updates", 1, "--prompts", 3, "--learning-rate", 0.0, 1e-3, "--json", tmp_path / "s.json"]
        printed = run("sweep", *weights, *small)
        rows = json.loads((tmp_path / "s.json").read_text())["rows"]
        assert [row["learning_rate"] for row in rows] == [0.0, 1e-3] and printed.count("\n| ") == 3
        assert all(-0.61 < row["reward"] <= 2 for row in rows)

    def test_signal(self, weights, module, capsys):
        assert module("sweep").main([*weights, *TINY[:4], "--signal", "3"]) == 0
        assert "mean cosine between 3 gradients: " in capsys.readouterr().out
