"""The search for settings, and the file that a comparison takes them from."""

import json

import pytest
from test_examples import COMPARE, module, weights  # noqa: F401 (fixtures)

from agents.experiments import tune, tuned

BUDGET = {"images": 1280}
WORLD = {"base_weights": "abc", "reward": "ocr", "reward_kwargs": {}, "prompts_from": None}


def file_of(tmp_path, **changes):
    path = tmp_path / "tuned.json"
    agents = {"grpo": {"settings": {"learning_rate": 1e-4, "temperature": 0.8}, "trials": []}}
    path.write_text(json.dumps({"world": WORLD, "budget": BUDGET, "agents": agents} | changes))
    return str(path)


class TestFile:
    def test_reads_the_settings_of_each_agent(self, tmp_path):
        assert tuned.load(file_of(tmp_path), WORLD | BUDGET) == {"grpo": {"learning_rate": 1e-4, "temperature": 0.8}}
        assert tuned.load("common", WORLD | BUDGET) == {}

    def test_of_another_world(self, tmp_path):
        path = file_of(tmp_path)
        for name, value in {"base_weights": "def", "reward": "ocr_edit", "prompts_from": "cvtg"}.items():
            with pytest.raises(ValueError, match=f"found with {name}=.*and here it is {value}: tune the agents in"):
                tuned.load(path, WORLD | BUDGET | {name: value})

    def test_the_shipped_file_is_left_out_where_it_does_not_fit(self):
        assert tuned.load(None, WORLD | BUDGET) == {}
        with pytest.raises(ValueError, match="the shipped settings: found with base_weights="):
            tuned.load("tuned", WORLD | BUDGET)

    def test_the_shipped_file_of_the_nearest_budget(self):
        found = {images: tuned.read(tuned.SHIPPED / f"images_{images}.json", "") for images in (1280, 2560)}
        world = found[1280].world
        assert world == found[2560].world and [file.images for file in found.values()] == [1280, 2560]
        for images, nearest in {64: 1280, 1280: 1280, 1800: 1280, 1820: 2560, 12_800: 2560}.items():
            assert tuned.load(None, world | {"images": images}) == found[nearest].agents

    @pytest.mark.parametrize("content", ["{", "[]", '{"agents": {}}', '{"world": {}, "agents": {"grpo": 3}}'])
    def test_no_such_file(self, tmp_path, content):
        path = tmp_path / "tuned.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"tuned.json: this is no file of vartext tune"):
            tuned.load(str(path), WORLD | BUDGET)
        with pytest.raises(ValueError, match=r"nowhere.json: No such file.*vartext tune writes"):
            tuned.load(str(tmp_path / "nowhere.json"), WORLD | BUDGET)


class TestTrials:
    def test_all_agents_get_the_same_points(self):
        grpo, vmr = (tune.trials(recipe, 8, 6) for recipe in ("grpo", "vmr+panw"))
        common = ("learning_rate", "kl_coef", "temperature", "epochs")
        assert [{name: trial[name] for name in common} for trial in vmr] == grpo
        assert all(set(trial) - set(common) == {"split", "suffix_samples"} for trial in vmr)
        assert {trial["split"] for trial in vmr} <= {2, 3, 4, 5} and {trial["suffix_samples"] for trial in vmr} == {
            2,
            4,
        }
        assert {trial["epochs"] for trial in grpo} == {1, 2, 3}
        assert tune.trials("grpo", 3, 6) == grpo[:3]  # the first ones are the same whatever the count

    def test_the_points_fill_the_ranges(self):
        found = tune.trials("grpo", 8, 6)
        for name, (low, high) in {
            "learning_rate": tune.LEARNING_RATE,
            "kl_coef": tune.KL_COEF,
            "temperature": tune.TEMPERATURE,
        }.items():
            values = sorted(trial[name] for trial in found)
            assert low <= values[0] < values[-1] <= high and len(set(values)) == 8
            middle = (low + high) / 2 if name == "temperature" else (low * high) ** 0.5
            assert 3 <= sum(value < middle for value in values) <= 5


def test_what_is_found_is_what_a_comparison_takes(weights, module, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "tune"
    assert module("tune").main([*weights, *COMPARE, "--agents", "grpo", "--trials", "2", "--out", str(out)]) == 0
    found = json.loads((out / "tuned.json").read_text())["agents"]["grpo"]
    assert len(found["trials"]) == 2
    assert found["reward"] == max(trial["reward"] for trial in found["trials"])
    assert "grpo-1" in (out / "report.html").read_text()
    assert "best" in (out / "results.md").read_text() and "tuned.json" in capsys.readouterr().out

    def cell(*options):
        args = module("compare").parse([*weights, *COMPARE, "--settings", str(out / "tuned.json"), *options])
        return module("runs").Comparison(args).cell("grpo", 0).method

    settings = found["settings"]
    assert {name: cell()[name] for name in settings} == settings
    given = cell("--learning-rate", "0.5", "--out", str(tmp_path / "c"))  # what is given comes first
    assert given.get("learning_rate", 0.5) == 0.5 and given["kl_coef"] == settings["kl_coef"]
