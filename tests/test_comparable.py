"""A folder holds one experiment: finished, unfinished and new runs are compared by all their settings."""

import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from test_examples import COMPARE, refused, weights  # noqa: F401 (a fixture)

from agents.experiments.cells import BASE
from agents.experiments.comparable import read, require_same
from agents.experiments.output import write_json

HERE = Path("runs/x")


class TestRequireSame:
    def test_the_same(self):
        require_same({"reward": "ocr", "seconds": 0.0}, {"reward": "ocr", "seconds": 5.0}, HERE)

    @pytest.mark.parametrize(
        ("asked", "config", "message"),
        [
            ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "runs/x holds a run with b=3, and now it is 2: choose another --out"),
            ({"a": 1}, {"a": 1, "beta": 3}, "with beta=3, and now it is no setting at all: "),
            ({"a": None}, {"a": 0}, "with a=0, and now it is None: "),
            ({"a": 1, "reward": "ocr"}, {"a": 2}, "with a=2, and now it is 1: "),  # before what is not told
            (
                {"a": 1, "reward": "ocr", "prompts_from": None},
                {"a": 1},
                "an earlier version, which did not write down its prompts_from, reward: choose another --out",
            ),
        ],
    )
    def test_what_differs_is_named(self, asked, config, message):
        with pytest.raises(ValueError, match=message):
            require_same(asked, config, HERE)

    def test_a_cap_that_counts(self):
        with pytest.raises(ValueError, match="seconds=5, and now it is 0"):
            require_same({"seconds": 0}, {"seconds": 5}, HERE, ())


class TestRead:
    def test_a_file_of_a_run(self, tmp_path):
        path = tmp_path / "result.json"
        assert read(path, "config") is None
        write_json(path, {"config": {}})
        assert read(path, "config") == {"config": {}}
        with pytest.raises(ValueError, match="has no finished, so an earlier version wrote it: choose another"):
            read(path, "config", "finished")
        for text in ("", "[]", "{"):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"result\.json cannot be read"):
                read(path)


def comparison(weights, *options, command="compare", judged_on="test"):  # noqa: F811
    """What a command compares, its options checked."""
    given = [*weights, *COMPARE, *options]
    args = import_module(f"agents.experiments.{command}").parse([str(option) for option in given])
    return import_module("agents.experiments.runs").Comparison(args, judged_on)


def began(made, cell, **more):
    """Leave what a run leaves that has begun, or is finished."""
    folder = made.out / cell.label if cell.seed is None else made.out / cell.label / f"seed{cell.seed}"
    write_json(folder / "config.json", made.asked(cell))
    if more:
        write_json(folder / "result.json", {"config": made.asked(cell), "finished": True, **more})


class TestComparison:
    def test_defaults_are_settings(self, weights, tmp_path):  # noqa: F811
        made = comparison(weights, "--agents", "grpo", "--out", tmp_path)
        cell = made.cell("grpo", 0)
        asked = made.asked(cell)
        assert (asked["clip_range"], asked["reward"], asked["reward_kwargs"]) == (0.2, "ocr", {})
        assert (asked["recipe"], asked["judged_on"], asked["lora"]) == ("grpo", "test", None)
        assert not {"seed", "device", "decoding", "alpha"} & asked.keys()
        began(made, cell)
        made.finished(comparison(weights, "--clip-range", 0.2, "--agents", "grpo", "--out", tmp_path).cell("grpo", 0))
        other = comparison(weights, "--clip-range", 0.3, "--agents", "grpo", "--out", tmp_path)
        with pytest.raises(ValueError, match=r"clip_range=0\.2, and now it is 0\.3"):
            other.finished(other.cell("grpo", 0))

    @pytest.mark.parametrize(("finished", "words"), [(False, {}), (True, {"stopped_at": None})])
    def test_another_reward_in_the_same_folder(self, finished, words, weights, tmp_path):  # noqa: F811
        made = comparison(weights, "--agents", "grpo", "--reward", "ocr_edit", "--out", tmp_path)
        began(made, BASE, **words)
        message = "reward=ocr_edit, and now it is ocr: choose another --out"
        for command, options in (("compare", ["--agents", "reinforce"]), ("ablate", ["m"]), ("tune", ["--trials", 1])):
            with pytest.raises(ValueError, match=message):
                comparison(weights, *options, "--out", tmp_path, command=command)

    def test_base_policies_judged_on_other_prompts(self, weights, tmp_path):  # noqa: F811
        began(comparison(weights, "--out", tmp_path, command="tune", judged_on="val"), BASE, stopped_at=None)
        with pytest.raises(ValueError, match="judged_on=val, and now it is test"):
            comparison(weights, "--out", tmp_path)

    def test_prompt_files_that_were_edited(self, weights, tmp_path):  # noqa: F811
        file = tmp_path / "prompts.txt"
        lines = [f'A sign that says "W{i}"' for i in range(60)]
        file.write_text("\n".join(lines))
        options = ["--prompts-from", file, "--out", tmp_path / "out"]
        began(comparison(weights, *options), BASE)
        comparison(weights, *options)
        file.write_text("\n".join([*lines, *(f'A sign that says "NEW{i}"' for i in range(20))]))
        with pytest.raises(ValueError, match="holds a run with prompts="):
            comparison(weights, *options)

    def test_a_run_that_a_cap_stopped(self, weights, tmp_path):  # noqa: F811
        capped = comparison(weights, "--seconds", 5, "--agents", "grpo", "--out", tmp_path)
        free = comparison(weights, "--agents", "grpo", "--out", tmp_path)
        cell = free.cell("grpo", 0)
        began(capped, cell, stopped_at=8)
        assert capped.finished(cell)["stopped_at"] == 8
        with pytest.raises(ValueError, match=r"seconds=5\.0, and now it is 0\.0"):
            free.finished(cell)
        began(capped, cell, stopped_at=None)
        assert free.finished(cell) is not None

    def test_checkpoints_without_settings_are_not_deleted(self, weights, tmp_path):  # noqa: F811
        made = comparison(weights, "--agents", "grpo", "--out", tmp_path)
        (tmp_path / "grpo" / "seed0" / "checkpoints" / "checkpoint-00000002").mkdir(parents=True)
        with pytest.raises(ValueError, match=r"holds checkpoints and no config\.json"):
            made.finished(made.cell("grpo", 0))

    def test_the_folder_is_taken_before_anything_is_measured(self, weights, tmp_path, monkeypatch):  # noqa: F811
        made = comparison(weights, "--agents", "grpo", "--out", tmp_path)

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(made, "result", interrupted)
        assert made.run([made.cell("grpo", 0)], lambda *_: "") == 130
        with pytest.raises(ValueError, match=r"learning_rate=5e-05, and now it is 0\.001"):
            comparison(weights, "--learning-rate", 1e-3, "--out", tmp_path)

    def test_a_worker_of_ray_compares_too(self, weights, tmp_path):  # noqa: F811
        made = comparison(weights, "--agents", "grpo", "--reward", "ocr_edit", "--out", tmp_path)
        began(made, BASE)
        other = Namespace(**{**vars(made.args), "reward": "ocr", "ray_cpus": 1})
        make = import_module("agents.experiments.runs").Comparison
        with pytest.raises(ValueError, match="reward=ocr_edit, and now it is ocr"):
            import_module("agents.experiments.ray_runs").train_one(make, other, made.cell("grpo", 0), str(tmp_path))


def test_the_command_writes_nothing_where_it_refuses(weights, tmp_path):  # noqa: F811
    began(comparison(weights, "--agents", "grpo", "--reward", "ocr_edit", "--out", tmp_path), BASE)
    before = sorted(tmp_path.rglob("*"))
    for command, options in (("compare", ["--agents", "reinforce"]), ("ablate", ["m"])):
        main = import_module(f"agents.experiments.{command}").main
        assert "reward=ocr_edit, and now it is ocr" in refused(main, *weights, *COMPARE, *options, "--out", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads((tmp_path / "base" / "config.json").read_text())["reward"] == "ocr_edit"


class TestQuestions:
    @pytest.fixture(autouse=True)
    def at_hand(self, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "questions")

    def test_worlds_of_another_experiment(self, weights, tmp_path):  # noqa: F811
        raster = import_module("raster")
        earlier = comparison(weights, "--reward", "ocr_edit", "--out", tmp_path / "var")
        now = comparison(weights, "--out", tmp_path / "raster")
        raster.require_same_worlds(tmp_path, {"raster": now})
        began(earlier, BASE)
        with pytest.raises(ValueError, match="var holds a run with reward=ocr_edit, and now it is ocr"):
            raster.require_same_worlds(tmp_path, {"raster": now})
        write_json(tmp_path / "var" / "base" / "config.json", now.asked(BASE) | {"base_weights": "another"})
        raster.require_same_worlds(tmp_path, {"raster": now})

    def test_measurements_of_another_reward(self, weights, tmp_path, monkeypatch):  # noqa: F811
        script = import_module("suffix_samples")
        monkeypatch.setattr(script, "measure", lambda *_: [])
        args = Namespace(batch_images=64, batches=1)
        made = comparison(weights, "--reward", "ocr_edit", "--out", tmp_path)
        assert script.measured(made, args, [0]) == script.measured(made, args, [0]) == []
        with pytest.raises(ValueError, match=r"k1-seed0\.json holds a run with reward=ocr_edit, and now it is ocr"):
            script.measured(comparison(weights, "--out", tmp_path), args, [0])
