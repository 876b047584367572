"""The example scripts, each run at a tiny size, in this process: importing torch anew takes longer than all they do."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_agent, tiny_policy, weights_of

from agents import GRPO, Checkpoints, Interrupt, load, recipes
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
    """What a script printed: the file itself, as the main program, with one thread like a process of `command`'s."""
    path, threads, printed = str(EXAMPLES / f"{script}.py"), torch.get_num_threads(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [path, *map(str, options)])
        patch.setattr(recipes.AGENTS, "_entries", dict(recipes.known()))  # the script's own names end with it
        torch.set_num_threads(1)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        torch.set_num_threads(threads)
    assert (end.value.code or 0) == status, end.value
    return printed.getvalue()


@pytest.fixture
def module():
    """Imports what a command is made of."""
    return lambda name: import_module(f"agents.experiments.{name}")


def refused(main, *options):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as error:
        main([str(option) for option in options])
    return str(error.value)


def rows_of(text, heading):
    """The cells of the first Markdown table below a heading, its headers first."""
    block = text.split(heading + "\n", 1)[1].split("|\n\n", 1)[0]
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


@pytest.mark.parametrize("script", ["ablate", "compare", "train", "evaluate", "play", "bench", "sweep"])
def test_help_shows_an_example_and_defaults(script, module, capsys):
    with pytest.raises(SystemExit) as end:
        module(script).parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"\n    vartext {script}" in text and "(default: " in text
    assert all(option in text for option in ("--policy", "--device", "--help-all")) and "--tokenizer" not in text
    assert len(text.splitlines()) <= 60
    with pytest.raises(SystemExit):
        module(script).parse(["--help-all"])
    everything = capsys.readouterr().out
    assert "--tokenizer" in everything and len(everything) > len(text)


def test_a_foreign_package_agents_is_named(tmp_path):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    done = subprocess.run(command("play"), capture_output=True, text=True, env=variables(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the package `agents` that Python finds is")


class TestAgentOptions:
    def test_every_option_has_a_help_text(self, module):
        for options in module("agent_options").agent_options():
            missing = [name for name, (_, text) in options.items() if not text.partition(": ")[2] and len(text) < 5]
            assert missing == []

    def test_help_is_what_the_constructors_say(self, module):
        class Base:
            def __init__(self, *, a: Annotated[int, "of the base"] = 1, b: Annotated[int, "told again"] = 2): ...

        class Derived(Base):
            def __init__(self, *, b: "Annotated[int, 'of its own']" = 3, c: int = 4, **rest): ...

        assert module("agent_options").help_of(Derived) == {"a": "of the base", "b": "of its own"}

    def test_help_and_defaults_come_from_the_classes(self, module, capsys):
        with pytest.raises(SystemExit):
            module("compare").main(["--help-all"])
        text = " ".join(capsys.readouterr().out.split())
        assert (
            "--alpha X panw: the exponent of eq. 9, at least 0. The paper finds 0.6 to 0.8 best. (default: 0.6)" in text
        )
        assert text.count("--kl-coef FLOAT weight") == 1 and "--kl-coef X" not in text  # the comparison's own, once

    @pytest.mark.parametrize(
        ("default", "text", "value"),
        [
            (2, "3", 3),
            (0.5, "1", 1.0),
            ("half", "4", 4),
            ("half", "m_32", "m_32"),
            (None, "0.2", 0.2),
            (None, "None", None),
        ],
    )
    def test_values(self, module, default, text, value):
        read = module("options").value_like(default)(text)
        assert read == value and type(read) is type(value)

    def test_settings_of_a_run(self, module):
        settings_of = module("agent_options").settings_of
        assert settings_of("grpo", {}) == settings_of("grpo", {"alpha": 0.8}) == {}
        assert settings_of("grpo+panw", {"alpha": 0.9, "epochs": 2}) == {"alpha": 0.9, "epochs": 2}
        assert settings_of("vmr", {"eta": 0.5})["eta"] == 0.5 and settings_of("vmr", {})["split"] == "half"
        assert settings_of("dr_grpo", {}) == {"advantage_scale": "none"}


RECIPES = ("grpo", "vmr+panw+mp")


@pytest.fixture(scope="module")
def compared(weights, tmp_path_factory):
    """A small comparison: its folder and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, run("compare", *weights, *COMPARE, "--agents", *RECIPES, "--seeds", 0, 1, "--out", out)


class TestCompare:
    def test_the_default_is_the_method_step_by_step(self, module):
        args = module("compare").parse([])
        assert args.agents == ["grpo", "vmr", "vmr+panw", "vmr+panw+mp"] and args.method == {}

    def test_agents_without_names_lists_them(self, module, capsys):
        with pytest.raises(SystemExit) as end:
            module("compare").main(["--agents"])
        text = capsys.readouterr().out
        assert not end.value.code
        for name in (*recipes.known(), *recipes.VARIANTS, *recipes.BUNDLES):
            assert f"\n  {name} " in text

    def test_results(self, compared):
        out, printed = compared
        results = json.loads((out / "results.json").read_text())
        assert [(r["agent"], r["seed"], r["finished"]) for r in results["runs"]] == [
            (agent, seed, True) for agent in RECIPES for seed in (0, 1)
        ]
        spent = {"grpo": {"tokens": 336, "updates": 4}, "vmr+panw+mp": {"tokens": 296, "updates": 2}}
        for r in results["runs"]:  # 16 images: of 21 tokens; two prefix updates of 4 rows, 5 tokens and 2 x 16 each
            assert r["budget"] | {"seconds": 0} == {"images": 16, "seconds": 0} | spent[r["agent"]]
            assert list(r["diagnostics"]) == ["temperature_1_1x1", "temperature_2_2x2", "temperature_3_4x4"]
            assert ("alpha" in r["config"]) == ("split" in r["config"]) == (r["agent"] != "grpo")
        assert len(results["base"]["prompts"]["prompt"]) == 5
        of_grpo = [r for r in results["runs"] if r["agent"] == "grpo"]
        for metric in ("reward", "word_accuracy", "ned", "nothing_read"):
            scores = [np.array(r["prompts"][metric]) for r in (results["base"], *of_grpo)]
            assert all(len(values) == 5 for values in scores)
            summary = results["summary"]["grpo"][metric]
            mean, low, high = summary["difference"]
            assert mean == pytest.approx(((scores[1] + scores[2]) / 2 - scores[0]).mean())
            assert low <= mean <= high
        assert results["settings"]["versions"]["torch"] == torch.__version__
        table = [line for line in printed.splitlines() if line.startswith("|")]
        assert len(table) == 2 + 4 * 3
        assert "\n".join(table) in (out / "results.md").read_text()

    def test_temperatures_and_numbers_of_words(self, compared):
        results = json.loads((compared[0] / "results.json").read_text())
        text = (compared[0] / "results.md").read_text()
        assert "## Learned temperatures" not in text  # they are frozen
        assert all(run["diagnostics"] == results["base"]["diagnostics"] for run in results["runs"])
        headers, *words = rows_of(text, "## Word Accuracy by the number of words")
        counts = [prompt.count('"') // 2 for prompt in results["base"]["prompts"]["prompt"]]
        assert headers == ["Policy", *(f"Words: {n} (prompts: {counts.count(n)})" for n in sorted(set(counts)))]
        assert [row[0] for row in words] == ["base", *RECIPES]

    def test_accuracy_is_that_of_the_prompts_with_so_many_words(self, module):
        prompts = {"prompt": ['"A"', '"B" "C"', '"D"'], "word_accuracy": [1.0, 0.5, 0.0]}
        lines = module("tables").words_table({"prompts": prompts}, []).splitlines()
        cells = [cell.strip() for cell in lines[2].split("|")]
        assert cells[2].startswith("0.500 [") and cells[3] == "0.500"  # one prompt has no interval

    def test_tensorboard(self, compared):
        for recipe, images in {"grpo": [4, 8, 12, 16], "vmr+panw+mp": [8, 16]}.items():
            events = EventAccumulator(str(compared[0] / recipe / "seed1"), {"images": 0, "tensors": 0}).Reload()
            tags = events.Tags()
            scalars = {"rollout/reward", "rollout/word_accuracy", "train/loss", "eval/word_accuracy", "budget/images"}
            assert scalars | {"conflict/kl_grad_norm_3_4x4", "policy/temperature_1_1x1"} <= set(tags["scalars"])
            assert [event.value for event in events.Scalars("budget/images")] == images
            assert [event.value for event in events.Scalars("eval/images")] == [0, *images[1::2]]
            assert {"samples/images", "conflict/cosine"} <= set(tags["images"])
            assert "samples/read/text_summary" in tags["tensors"]

    def test_a_page_to_look_at(self, compared):
        page = (compared[0] / "report.html").read_text()
        assert page.count('class="tile"') == 5 * 3 and page.count('class="mask"') > 0 and "no curves" not in page
        kept = [json.loads((compared[0] / agent / "seed0" / "gallery.json").read_text()) for agent in RECIPES]
        assert ["masks" in of["prompts"][0] for of in kept] == [False, True]

    def test_images(self, compared):
        sheet = Image.open(compared[0] / "before_after.png")
        strips = [
            Image.open(compared[0] / name / "samples.png") for name in ("base", "grpo/seed0", "vmr+panw+mp/seed0")
        ]
        assert sheet.width == strips[0].width and sheet.height > sum(strip.height for strip in strips)
        curves = np.asarray(Image.open(compared[0] / "curves.png").convert("RGB"), int)
        for colour in ((31, 119, 180), (255, 127, 14)):  # the lines of the first agents
            assert (np.abs(curves - colour).sum(-1) < 30).sum() > 400

    def test_a_rerun_trains_what_is_missing_and_gets_the_same(self, compared, weights, module, capsys):
        out, printed = compared
        folders = [out / agent / f"seed{seed}" for agent in RECIPES for seed in (0, 1)]
        files = [folder / "result.json" for folder in folders]
        lost = {file: json.loads(file.read_text()) for file in (files[1], files[2])}
        kept = {file: file.stat().st_mtime_ns for file in (files[0], files[3])}
        for file in lost:
            file.unlink()
        options = [*weights, *COMPARE, "--agents", *RECIPES, "--seeds", "0", "1", "--out", str(out)]
        assert module("compare").main(options) == 0
        told = capsys.readouterr()
        assert "grpo, seed 0: finished earlier" in told.err and "base: evaluating" not in told.err
        assert told.out == printed and all(file.stat().st_mtime_ns == written for file, written in kept.items())
        for file, before in lost.items():
            again = json.loads(file.read_text())
            assert {name: again[name] for name in ("prompts", "metrics", "diagnostics")} == {
                name: before[name] for name in ("prompts", "metrics", "diagnostics")
            }
            assert len(list(file.parent.glob("events*"))) == 1
        assert not list(out.rglob(".*"))  # no half-written file

    def test_another_x_axis(self, compared, weights, module):
        before = (compared[0] / "curves.png").read_bytes()
        options = [*weights, *COMPARE, "--agents", *RECIPES, "--seeds", "0", "1", "--out", str(compared[0])]
        assert module("compare").main([*options, "--x-axis", "tokens"]) == 0
        assert (compared[0] / "curves.png").read_bytes() != before

    def test_other_settings_need_another_folder(self, compared, weights, module):
        options = [*weights, *COMPARE, "--agents", *RECIPES, "--out", compared[0]]
        message = refused(module("compare").main, *options, "--learning-rate", "3e-5")
        assert "learning_rate=5e-05, and now it is 3e-05" in message and "--out" in message
        assert "alpha=0.6, and now it is 0.8" in refused(module("compare").main, *options, "--alpha", "0.8")

    def test_settings_that_no_agent_uses(self, module, tmp_path):
        message = refused(module("compare").main, "--agents", "grpo", "gspo", "--alpha", "0.8", "--out", tmp_path)
        assert message == "error: none of grpo, gspo has the option --alpha: leave it out"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--agents", "grpo", "vmr+pamw"], "unknown agent 'pamw' in 'vmr+pamw': choose from grpo, "),
            (["--agents", "grpo", "vmr+vmr"], "'vmr+vmr' names two algorithms"),
            (["--plugin", "nowhere.py"], "nowhere.py"),
            (["--plugin", "no_such_module"], "No module named 'no_such_module'"),
            (["--split", "9"], "split must be the number of prefix grids, 1 to 3"),
            (["--agents", "vmr+panw", "--alpha", "-1"], "alpha must be a finite number of at least 0, got -1.0"),
            (["--suffix-samples", "0"], "suffix_samples must be a whole number of at least 1, got 0"),
        ],
    )
    def test_wrong_agents(self, options, message, weights, module, tmp_path):
        assert message in refused(module("compare").main, *weights, *COMPARE, *options, "--out", tmp_path)

    def test_agents_that_learn_from_few_images_or_none(self, weights, tmp_path):
        printed = run("compare", *weights, *COMPARE, "--agents", "best_of_n", "raft", "--n", 2, "--out", tmp_path)
        assert [row[1] for row in rows_of("\n" + printed + "\n", "")[1:4]] == ["base", "best_of_n", "raft"]
        runs = json.loads((tmp_path / "results.json").read_text())["runs"]
        assert [(r["budget"]["images"], r["budget"]["updates"]) for r in runs] == [(0, 0), (16, 4)]
        assert runs[0]["config"]["n"] == 2 and Image.open(tmp_path / "curves.png").width > 0

    def test_another_reward(self, weights, module, tmp_path):
        options = [*weights, *COMPARE, "--agents", "grpo", "--out", str(tmp_path), "--reward-kwargs"]
        assert module("compare").main([*options, '{"penalty_weight": 0.25}']) == 0
        run = json.loads((tmp_path / "results.json").read_text())["runs"][0]
        assert run["config"]["reward"] == "ocr" and run["config"]["reward_kwargs"] == {"penalty_weight": 0.25}
        assert run["metrics"]["reward"][0] == -0.25  # nothing can be read in random images
        assert "penalty_weight': 0.25" in refused(module("compare").main, *options, '{"penalty_weight": 0.5}')

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--reward", "taste"], "unknown reward 'taste'; available: ocr, "),
            (["--reward", "geneval"], "needs `.clauses`"),
            (["--reward", "http://127.0.0.1:9", "--reward-kwargs", '{"retries": 0}'], "http://127.0.0.1:9"),
            (["--reward-kwargs", '{"penalty": 1}'], "unknown option 'penalty' of reward 'ocr'; available: "),
        ],
    )
    @pytest.mark.parametrize("script", ["compare", "train", "evaluate"])
    def test_wrong_rewards(self, script, options, message, weights, module, tmp_path):
        assert message in refused(module(script).main, *weights, *options, "--out", tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_reward_options_that_are_no_json_object(self, text, module, capsys):
        with pytest.raises(SystemExit) as end:
            module("compare").parse(["--reward-kwargs", text])
        assert end.value.code == 2 and "is no JSON" in capsys.readouterr().err

    def test_a_cap_on_the_time(self, weights, module, tmp_path, capsys):
        options = [*weights, *COMPARE, "--agents", "grpo", "--images", "4000", "--seconds", "0.01"]
        options += ["--out", str(tmp_path)]
        assert module("compare").main(options) == 0
        run = json.loads((tmp_path / "results.json").read_text())["runs"][0]
        assert run["finished"] and run["budget"]["images"] < 100
        assert "stopped at" in capsys.readouterr().err

    def test_a_run_that_fails_is_left_out(self, weights, module, tmp_path, monkeypatch, capsys):
        compare = module("compare")
        monkeypatch.setattr(GRPO, "update", lambda *_: (_ for _ in ()).throw(RuntimeError("the loss is nan")))
        assert compare.main([*weights, *COMPARE, "--agents", "grpo", "--out", str(tmp_path)]) == 1
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
        assert "SIGINT: finishing this update" in told and "Interrupted" in printed
        (only,) = json.loads((tmp_path / "results.json").read_text())["runs"]
        assert not only["finished"] and 8 <= only["budget"]["images"] < 10**6
        assert len(only["prompts"]["reward"]) == 5
        assert "stopped at" in (tmp_path / "results.md").read_text()
        assert (tmp_path / "before_after.png").is_file() and (tmp_path / "curves.png").is_file()

    def test_the_second_ctrl_c_is_immediate(self, module, capsys):
        with Interrupt("noted") as interrupt:
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
        ("train", ["--clip-range", "0"], "clip_range must be above 0, got 0.0"),
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
        assert "unknown setting 'alpha'" in refused(module("train").main, *options, "--resume", "--alpha", 0.5)
        more = [*map(str, options), "--resume", "--images", "24", "--learning-rate", "3e-5"]
        more += ["--entropy-coef", "0.1"]  # the rewards are all equal, and would move nothing
        assert module("train").main(more) == 0
        agent = GRPO.load(trained / "agent.zip", device="cpu")
        assert (agent.images_decoded, agent.learning_rate, agent.clip_range, agent.decoding.top_k) == (24, 3e-5, 0.3, 8)
        assert module("train").main(more) == 0  # nothing left to do

    def test_schedule_average_and_best(self, weights, module, tmp_path):
        options = [*weights, *TINY, "--eval-prompts", "2", "--eval-every", "2", "--out", str(tmp_path)]
        options += ["--entropy-coef", "0.1"]  # the rewards are all equal, and would move nothing
        rate = ["--learning-rate", "1e-3", "--schedule", "linear", "--warmup", "0.5", "--ema-decay", "0.5"]
        assert "--warmup belongs to a --schedule" in refused(module("train").main, *options, *rate[4:])
        assert module("train").main([*options, *rate]) == 0
        events = EventAccumulator(str(tmp_path)).Reload()
        rates = [event.value for event in events.Scalars("train/learning_rate")]
        assert rates == pytest.approx([0.0, 0.5e-3, 1e-3, 0.5e-3])
        agent = load(tmp_path / "agent.zip", device="cpu")
        saved = type(agent.policy).load(tmp_path / "policy.safetensors", agent.policy.tokenizer)
        assert all(torch.equal(weight, weights_of(agent.ema)[name]) for name, weight in weights_of(saved).items())
        assert not torch.equal(agent.ema.head.weight, agent.policy.head.weight)
        best = json.loads((tmp_path / "best.json").read_text())
        assert best["metric"] == "word_accuracy" and (tmp_path / "best.safetensors").is_file()

    def test_a_wrapped_agent(self, weights, module, tmp_path, capsys):
        options = [*weights, *TINY, "--eval-prompts", 2, "--out", tmp_path]
        wrapped = ["--agent", "vmr+panw+mp", "--split", "m_32", "--alpha", 0.9, "--soft", "--prefix-updates", 1]
        message = refused(module("train").main, *options, "--agent", "grpo+panw", "--eta", 2)
        assert "'grpo+panw' has no option 'eta': it has " in message
        assert module("train").main([str(option) for option in [*options, *wrapped]]) == 0
        chain = "MaskPropagation(PANW(VMR(split=2, suffix_samples=2, eta=1.0), alpha={}), boxes='read', soft=True, "
        agent = load(tmp_path / "agent.zip", device="cpu")
        assert str(agent).startswith(chain.format(0.9)) and agent.prefix_updates == 1
        assert (agent.images_decoded, agent.n_updates) == (20, 3)  # 8, 4 and 8
        more = [*options[4:], "--resume", "--images", 24, "--alpha", 0.7, "--temperature", 0.9]
        assert module("train").main([str(option) for option in more]) == 0
        agent = load(tmp_path / "agent.zip", device="cpu")
        assert str(agent).startswith(chain.format(0.7)) and agent.decoding.temperature == 0.9
        assert (agent.images_decoded, agent.n_updates) == (24, 4)
        assert module("play").main(["--policy", str(tmp_path / "agent.zip"), "--quiet"]) == 0
        assert "split must be the number of prefix grids" in refused(module("train").main, *more, "--split", 9)

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
        assert "nan" in message and "is intact: --resume goes on from it" in message
        assert Checkpoints(tmp_path / "checkpoints").load(device="cpu").n_updates > 0


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

    def test_gates_of_random_weights(self, weights, tmp_path):
        printed = run("evaluate", *weights, "--gates", "--prompts", 3, "--out", tmp_path, status=1)
        lines = [line for line in printed.splitlines() if "word accuracy at temperature 1" in line]
        assert len(lines) == 1 and "0.3 to 0.6" in lines[0] and "FAIL" in lines[0]
        written = json.loads((tmp_path / "evaluation.json").read_text())
        assert len(written["gates"]) == 9 and len(written["prompts"]["prompt"]) == 3

    @pytest.mark.parametrize(("copy", "share"), [(lambda images: images, 1.0), (np.zeros_like, 0.0)])
    def test_the_tokenizer_gate(self, weights, module, monkeypatch, copy, share):
        script, gates = module("measuring"), module("gates")
        args = module("evaluate").parse(weights)
        env = script.make_env(script.load_policy(args))
        monkeypatch.setattr(gates, "reconstruct", lambda env, images: copy(images))
        measured, readable = gates.tokenizer_gate(env, script.held_out_scenes(env.world, 3))
        assert measured == share and readable >= 3

    def test_wrong_files(self, module, tmp_path):
        main = module("evaluate").main
        assert "no agent at" in refused(main, "--policy", tmp_path / "none.zip")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"nothing")
        assert str(broken) in refused(main, "--policy", broken, "--tokenizer", broken)


class TestPlay:
    def test_images_grow(self, weights, tmp_path):
        prompt = 'A navy sign that says "KITE" in yellow letters'
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
        assert module("showing").half_blocks(image, 2) == (
            "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀\x1b[38;2;0;255;0m\x1b[48;2;9;9;9m▀\x1b[0m"
        )

    def test_a_prompt_without_words(self, weights, module):
        assert "names no word in double quotes" in refused(module("play").main, "A sign", *weights)


def test_a_run_that_another_process_finished_meanwhile_is_kept(weights, compared, module):
    options = [*weights, *COMPARE, "--agents", *RECIPES, "--seeds", 0, 1, "--out", compared[0]]
    args = module("compare").parse([str(option) for option in options])
    comparison = module("runs").Comparison(args)
    plan, seen = [comparison.cell("grpo", seed) for seed in args.seeds], []

    def finished_by_now(cell):
        seen.append(cell)
        return type(comparison).finished(comparison, cell) if seen.count(cell) > 1 or cell.seed is None else None

    comparison.finished = finished_by_now
    comparison.train = None  # not to be called
    results = []
    assert comparison.run(plan, lambda base, runs: results.extend(runs) or "") == 0
    assert [run["seed"] for run in results] == [0, 1]


class TestSweep:
    def test_rows_of_a_grid(self, weights, tmp_path):
        small = [*TINY[:4], "--updates", 1, "--prompts", 3, "--learning-rate", 0.0, 1e-3, "--json", tmp_path / "s.json"]
        printed = run("sweep", *weights, *small)
        rows = json.loads((tmp_path / "s.json").read_text())["rows"]
        assert [row["learning_rate"] for row in rows] == [0.0, 1e-3] and printed.count("\n| ") == 3
        assert all(-0.61 < row["reward"] <= 2 for row in rows)

    def test_prefix_share(self, weights, module, capsys):
        assert module("sweep").main([*weights, *TINY[:4], "--prefix-share", "2"]) == 0
        rows = rows_of("\n" + capsys.readouterr().out + "\n", "")
        assert [row[:3] for row in rows[1:]] == [["1", "1", "4.8%"], ["2", "5", "23.8%"]]  # of 1 + 4 + 16 tokens
        assert all(row[-1] == "no variance" for row in rows[1:])  # nothing can be read in random images

    def test_variance_components(self, module):
        rng = torch.Generator().manual_seed(0)
        prompts, prefixes, suffixes = (
            torch.randn(*shape, generator=rng, dtype=torch.float64)
            for shape in ((2000, 1, 1), (2000, 4, 1), (2000, 4, 3))
        )
        between, within = module("sweeping").variance_components(5 * prompts + 2 * prefixes + 3 * suffixes)
        assert between == pytest.approx(4, rel=0.1) and within == pytest.approx(9, rel=0.1)

    def test_conflict(self, weights, module, capsys):
        assert module("sweep").main([*weights, *TINY[:2], "--conflict", "2"]) == 0
        rows = rows_of("\n" + capsys.readouterr().out + "\n", "")
        assert rows[0] == ["Cosine", "1x1", "2x2", "4x4", "Reliability", "Share of the lengths"]
        assert [row[0] for row in rows[1:]] == ["1x1", "2x2", "4x4"]

    def test_signal(self, weights, module, tmp_path, capsys):
        """All rewards are the same, as nothing can be read in random images: the gradients are zero, without error."""
        file = tmp_path / "signal.json"
        assert module("sweep").main([*weights, *TINY[:4], "--signal", "3", "--json", str(file)]) == 1
        rows = rows_of("\n" + capsys.readouterr().out + "\n", "")
        assert rows[1] == [
            "mean cosine between the gradients of 3 batches of 4 images",
            "0.0000",
            "at least 0.05",
            "FAIL",
        ]
        assert rows[2][-1] == "PASS" and json.loads(file.read_text())["cosine"] == 0

    def test_fault_share(self, weights, module, tmp_path, capsys):
        files = ["--json", str(tmp_path / "faults.json"), "--png", str(tmp_path / "faults.png")]
        assert module("sweep").main([*weights, "--fault-share", "3", *files]) == 0
        rows = rows_of("\n" + capsys.readouterr().out + "\n", "")
        assert rows[0] == ["m", "Tokens", "Of all", "Letter", "Missing", "Colour"]
        assert [row[:3] for row in rows[1:]] == [["1", "1", "4.8%"], ["2", "5", "23.8%"]]  # of 1 + 4 + 16 tokens
        written = json.loads((tmp_path / "faults.json").read_text())
        assert written["prompts"] == 3 and [row["letter"] for row in written["rows"]] == [None, None]
        assert Image.open(tmp_path / "faults.png").width > 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--fault-share", "1"], "at least 2 prompts"),
            (["--signal", "3", "--fault-share", "2"], "not allowed with"),
            (["--signal", "3", "--png", "a.png"], "add --fault-share N"),
            (["--prefix-share", "2", "--json", "a.json"], "leave out --json"),
        ],
    )
    def test_options_that_do_not_fit(self, module, capsys, options, message):
        with pytest.raises(SystemExit):
            module("sweep").parse(options)
        assert message in capsys.readouterr().err


class TestCustomAgent:
    @pytest.mark.parametrize("script", ["custom_agent", "custom_wrapper"])
    def test_is_compared_with_grpo(self, weights, script, tmp_path):
        printed = run(script, *weights, *COMPARE, "--out", tmp_path)
        mine = {"custom_agent": "soft_best", "custom_wrapper": "grpo+coarse_first"}[script]
        policies = [row[1] for row in rows_of("\n" + printed + "\n", "")[1:4]]
        assert policies == ["base", "grpo", mine]
        assert (tmp_path / mine / "seed0" / "policy.safetensors").is_file()

    def test_joins_as_a_plugin(self, weights, tmp_path):
        small = [*weights, *COMPARE, "--out", tmp_path / "runs"]
        printed = run("compare", "--plugin", EXAMPLES / "custom_agent.py", *small, "--agents", "soft_best", "--beta", 2)
        assert "soft_best" in printed
        result = json.loads((tmp_path / "runs" / "soft_best" / "seed0" / "result.json").read_text())
        assert result["config"]["beta"] == 2.0

    def test_from_scratch_in_less_than_80_lines(self):
        assert len((EXAMPLES / "custom_agent.py").read_text().splitlines()) < 80

    def test_softmax_weights(self, module, parts):
        agent = tiny_agent(parts, import_module("examples.custom_agent").SoftBest, beta=0.01)
        before = weights_of(agent.policy)
        agent.iterate()
        assert agent.n_updates == 1 and agent.images_decoded == 8 and agent.seconds > 0
        assert any(not torch.equal(before[name], weight) for name, weight in weights_of(agent.policy).items())

    def test_grids_join_one_by_one(self, module, parts):
        agent = import_module("examples.custom_wrapper").CoarseFirst(tiny_agent(parts), updates_per_scale=2)
        rollout, whole = agent.sample(), range(3)
        for updates, tokens in ((0, 1), (1, 1), (2, 5), (3, 5), (4, 21)):
            agent.unwrapped._n_updates = updates
            weights = agent.token_weights(rollout, whole)
            assert (weights.policy > 0).sum(1).tolist() == [tokens] * 8 and (weights.kl > 0).all()
