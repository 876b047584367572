"""A run that goes on keeps its world; what is given again and differs is told, or refused."""

import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from test_examples import TINY, module, refused, weights  # noqa: F401 (fixtures)

from agents import Checkpoints
from agents.experiments import run_file
from var_env.prompts import PromptWorld
from var_env.scenes import World

PLUGIN = "from agents import Wrapper, register\n"


def train(*options):
    return import_module("agents.experiments.train").parse([str(option) for option in options])


def keep(kept, *options, **default):
    """The options of a run that goes on."""
    args = train("--resume", *options)
    given = {name: getattr(args, name) for name in run_file.NAMES if name != "plugin"}
    given = {name: value for name, value in given.items() if value is not None}
    run_file.keep(args, kept, given, default)
    return args


class TestParse:
    def test_what_is_given_can_be_told_from_what_is_not(self, tmp_path):
        again = train("--resume", "--out", tmp_path, "--eval-prompts", 64)
        assert again.eval_prompts == 64
        for name in ("agent", "seed", "images", "reward", "reward_kwargs", "save_every", "save_total", "eval_every"):
            assert getattr(again, name) is None
        new = train("--out", tmp_path)
        assert (new.agent, new.seed, new.images, new.reward, new.reward_kwargs) == ("grpo", 0, 6400, "ocr", {})

    def test_help_tells_the_defaults(self, capsys):
        with pytest.raises(SystemExit):
            train("--help-all")
        text = " ".join(capsys.readouterr().out.split())
        for shown in ("budget in reward calls (default: 6400)", "service (default: ocr)", "--seed SEED (default: 0)"):
            assert shown in text
        assert "(default: None)" not in text.partition("settings of every agent")[0]


class TestKeep:
    def test_what_is_not_given_is_as_it_was(self):
        kept = {"reward": "ocr_edit", "reward_kwargs": {"a": 1}, "images": 8, "regions": {"1": 0.5, "2": 0.5}}
        args = keep(kept, "--eval-prompts", 2, eval_every=20, images=6400)
        assert (args.reward, args.reward_kwargs, args.images, args.eval_prompts) == ("ocr_edit", {"a": 1}, 8, 2)
        assert args.regions == {1: 0.5, 2: 0.5} and args.eval_every == 20 and args.prompts_from is None

    def test_settings_of_the_agent(self):
        args = keep({"agent": "grpo", "kl_coef": 0.1, "learning_rate": 1e-3, "schedule": "linear"}, "--warmup", 0.5)
        assert (args.kl_coef, args.learning_rate, args.schedule, args.warmup) == (0.1, 1e-3, "linear", 0.5)

    @pytest.mark.parametrize(
        ("kept", "options", "message"),
        [
            ({"agent": "grpo"}, ["--agent", "vmr"], "--agent vmr, was grpo: a run keeps it"),
            ({"seed": 0}, ["--seed", 1], "--seed 1, was 0: a run keeps it"),
            ({}, ["--policy", "a.safetensors"], "--policy a.safetensors, was not given: a run keeps it"),
            ({"tokenizer": "/a"}, ["--tokenizer", "/b"], "--tokenizer /b, was /a: a run keeps it"),
            ({"plugin": ["my/agents.py"]}, [], "this run began with --plugin my/agents.py: give it again"),
            ({"prompts_from": "/nowhere/a.txt"}, [], "the prompts of this run, /nowhere/a.txt, are gone"),
        ],
    )
    def test_what_cannot_be_changed_or_had_again(self, kept, options, message):
        with pytest.raises(ValueError, match=message):
            keep(kept, *options)

    def test_settings_that_come_too_late(self):
        for kept, given in (({"kl_coef": 0.0}, {"kl_coef": 0.1}), ({}, {"lora": {"r": 8}})):
            with pytest.raises(ValueError, match="begin another"):
                run_file.keep(train("--resume"), kept, given, {})

    def test_the_same_again_is_fine(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plug.py").write_text(PLUGIN)
        (tmp_path / "prompts.txt").touch()
        kept = {"plugin": ["elsewhere/plug.py"], "agent": "grpo", "prompts_from": str(tmp_path / "prompts.txt")}
        args = keep(
            kept, "--agent", "grpo", "--plugin", "plug.py", "--prompts-from", "prompts.txt", "--seed", 0, seed=0
        )
        assert (args.agent, args.plugin, args.prompts_from) == ("grpo", ["plug.py"], "prompts.txt")


class TestChanges:
    def test_against_what_was_kept_and_the_defaults(self):
        kept, default = {"reward": "ocr_edit", "branching": [4, 2]}, {"images": 6400, "lora": None}
        given = {"reward": "ocr", "branching": (4, 2), "images": 6400, "lora": {"r": 2}}
        assert run_file.changes(kept, given, default) == {"reward": "ocr_edit", "lora": None}

    def test_one_line(self):
        assert run_file.told("reward", "ocr", "ocr_edit") == "--reward ocr, was ocr_edit"
        assert run_file.told("prompts_from", "a.txt", None) == "--prompts-from a.txt, was not given"
        assert run_file.told("reward_kwargs", {"a": 1}, {}) == '--reward-kwargs {"a": 1}, was {}'


class TestFile:
    def test_what_is_written_is_read(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("p.safetensors").touch()
        args = train("--policy", "p.safetensors", "--regions", "1:0.5,2:0.5", "--reward", "ocr_edit", "--out", tmp_path)
        run_file.write(tmp_path, args, {"branching": (4, 2), "recompute": False}, World())
        kept = run_file.read(tmp_path)
        assert kept["policy"] == str(tmp_path / "p.safetensors") and kept["regions"] == {"1": 0.5, "2": 0.5}
        assert (kept["reward"], kept["branching"], kept["recompute"]) == ("ocr_edit", [4, 2], False)
        assert "prompts" not in kept and "tokenizer" not in kept

    def test_damaged_or_missing(self, tmp_path):
        assert run_file.read(tmp_path) is None
        for text in ("{", "[1]"):
            (tmp_path / "run.json").write_text(text)
            with pytest.raises(ValueError, match=f"{tmp_path / 'run.json'} cannot be read"):
                run_file.read(tmp_path)

    def test_prompts_that_were_edited(self, tmp_path):
        file = tmp_path / "prompts.txt"
        lines = [f'A sign that says "W{i}"' for i in range(60)]
        file.write_text("\n".join(lines))
        world = PromptWorld(file, 64)
        kept = {"prompts_from": str(file), **run_file.fingerprint(world)}
        run_file.require_prompts(kept, world, given=False)
        file.write_text("\n".join([*lines, 'A sign that says "ONE MORE"', 'A sign that says "AGAIN"']))
        with pytest.raises(ValueError, match="holds other prompts than when this run began: give --prompts-from"):
            run_file.require_prompts(kept, PromptWorld(file, 64), given=False)
        run_file.require_prompts(kept, PromptWorld(file, 64), given=True)


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def began(weights, tmp_path_factory):  # noqa: F811
    """The folder of a run with another reward, two updates long."""
    out = tmp_path_factory.mktemp("began")
    options = ["--reward", "ocr_edit", "--eval-prompts", 2, "--images", 8, "--entropy-coef", 0.1, "--out", out]
    assert import_module("agents.experiments.train").main([*weights, *TINY, *map(str, options)]) == 0
    return out


def go_on(out, *options):
    """`training.run` on a run that has images left, for one more update."""
    return import_module("agents.experiments.train").main(["--resume", "--out", str(out), *map(str, options)])


class TestResume:
    def test_its_world_is_kept(self, began, capsys):
        assert go_on(began) == 0
        assert "has seen 8 images: give a larger --images" in capsys.readouterr().out
        assert go_on(began, "--images", 12, "--eval-prompts", 2, "--device", "cpu") == 0
        told = capsys.readouterr().err
        assert "--images 12, was 8\n" in told and "another run" not in told
        kept = run_file.read(began)
        assert (kept["reward"], kept["images"], kept["entropy_coef"]) == ("ocr_edit", 12, 0.1)
        assert not list(began.glob("best-until-*"))

    def test_another_reward_is_told_and_the_best_begins_anew(self, began, capsys):
        best = json.loads((began / "best.json").read_text())
        updates = Checkpoints(began / "checkpoints").load(device="cpu").n_updates
        assert go_on(began, "--reward", "ocr", "--images", 16, "--device", "cpu") == 0
        told = capsys.readouterr().err
        assert "--reward ocr, was ocr_edit: it is another run from here on\n" in told
        assert json.loads((began / f"best-until-{updates}.json").read_text()) == best
        assert (began / f"best-until-{updates}.safetensors").is_file()
        assert json.loads((began / "best.json").read_text())["updates"] >= updates
        assert run_file.read(began)["reward"] == "ocr"

    def test_a_folder_of_an_earlier_version(self, began, module):  # noqa: F811
        before = (began / "run.json").read_bytes()
        (began / "run.json").unlink()
        try:
            main = module("train").main
            message = refused(main, "--resume", "--out", began, "--images", 20, "--device", "cpu")
            assert "has no run.json" in message and "give its --reward again" in message
            options = ["--reward", "ocr", "--seed", 0, "--device", "cpu"]
            assert "leave out --seed" in refused(main, "--resume", "--out", began, *options)
        finally:
            (began / "run.json").write_bytes(before)

    def test_a_refusal_changes_nothing(self, began, module):  # noqa: F811
        before = {path: path.stat().st_mtime_ns for path in began.rglob("*")}
        assert "was grpo" in refused(module("train").main, "--resume", "--out", began, "--agent", "vmr")
        assert {path: path.stat().st_mtime_ns for path in began.rglob("*")} == before


class TestSchedule:
    def test_each_part_is_kept(self):
        training = import_module("agents.experiments.training")
        args = Namespace(learning_rate=None, schedule=None, warmup=None)
        assert training.learning_rate_of(args) == 5e-5
        args = keep({"learning_rate": 1e-3, "schedule": "linear", "warmup": 0.5}, "--schedule", "cosine")
        schedule = training.learning_rate_of(args)
        assert (type(schedule).__name__, schedule.start, schedule.warmup) == ("WarmupCosine", 1e-3, 0.5)
