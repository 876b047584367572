"""The scripts of examples/questions at a tiny size: what they train, measure and write, and how they go on."""

import json
import math
import shutil
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_examples import COMPARE, EXAMPLES, refused, rows_of, run, weights
from tiny import tiny_policy

from agents.mask_propagation import COMBINATIONS
from agents.panw import panw_weights
from rewards.base import Reward, RewardOutput
from var_env import ScaleSchedule, Tokenizer
from var_env.tokenizers.raster import RasterTokenizer

__all__ = ["weights"]  # a fixture
MEASURE = ["--batch-images", "16", "--batches", "2"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script as if it were run."""
    monkeypatch.syspath_prepend(EXAMPLES / "questions")
    return import_module


@pytest.fixture(scope="module")
def raster(tmp_path_factory):
    """The options that name a small raster policy and its tokenizer: four tokens."""
    folder = tmp_path_factory.mktemp("raster")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = RasterTokenizer(Tokenizer(ScaleSchedule([(2, 2)], patch=32), 32, channels=4, width=8, blocks=1))
    tokenizer.save(folder / "tokenizer.safetensors")
    tiny_policy(tokenizer).save(folder / "policy.safetensors")
    files = {"--raster-policy": "policy.safetensors", "--raster-tokenizer": "tokenizer.safetensors"}
    return [part for option, file in files.items() for part in (option, str(folder / file))]


def finished(out):
    """When each run was finished."""
    files = out.rglob("seed*/result.json")
    return {str(path.parent.relative_to(out)): path.stat().st_mtime_ns for path in files}


def is_drawn(path):
    return np.asarray(Image.open(path).convert("L")).std() > 10


@pytest.mark.parametrize("name", ["hindsight", "raster", "suffix_samples", "split", "tree"])
def test_help_teaches(name, script, capsys):
    with pytest.raises(SystemExit) as end:
        script(name).main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python examples/questions/{name}.py" in text
    assert all(option in text for option in ("--preset", "--seeds", "--policy", "--images", "(default: "))
    with pytest.raises(SystemExit):
        script(name).main(["--help-all"])
    assert "Several processes may share one --out" in " ".join(capsys.readouterr().out.split())


class TestStatistics:
    def result(self, agent, seed, rewards):
        return {
            "agent": agent,
            "seed": seed,
            "prompts": {"reward": rewards},
            "metrics": {},
            "budget": {"updates": 3},
        }

    def test_differences_are_paired_by_seed_and_prompt(self, script):
        difference = script("question").difference
        mine = [self.result("a", seed, [1.0 + seed, 2.0 + seed]) for seed in (0, 1, 2)]
        theirs = [self.result("b", seed, [0.5, 1.0]) for seed in (2, 0)]
        found = difference(mine, theirs, "reward")
        assert found["by_seed"] == {"0": 0.75, "2": 2.75}
        assert found["error"] == pytest.approx(1.0) and found["interval"] == pytest.approx((1.75, 1.5, 2.0))
        assert difference(mine[:1], theirs, "reward")["error"] is None
        assert difference(mine[1:2], theirs, "reward") == {}


@pytest.fixture(scope="module")
def split(weights, tmp_path_factory):
    """The folder, what was printed, and the options, of a run as a user starts it."""
    out = tmp_path_factory.mktemp("questions") / "split"
    options = [*weights, *COMPARE, "--images", "24", "--seeds", "0", "--out", str(out)]
    return out, run("questions/split", *options), options


class TestSplit:
    def test_every_split_and_auto(self, split):
        out, printed, _ = split
        arms = ["grpo", "vmr-m1", "vmr-m2", "vmr-auto"]
        results = json.loads((out / "results.json").read_text())
        assert [(r["agent"], r["seed"]) for r in results["runs"]] == [(arm, 0) for arm in arms]
        assert list(results["arms"]) == ["base", *arms] and results["reference"] == "vmr-auto"
        assert {r["agent"]: r["config"].get("split") for r in results["runs"]} == {
            "grpo": None,
            "vmr-m1": 1,
            "vmr-m2": 2,
            "vmr-auto": "auto",
        }
        assert all(r["budget"]["images"] == 24 for r in results["runs"])
        headers, base, *rows = rows_of("\n" + printed + "\n\n", "")
        assert headers[:3] == ["Arm", "Seeds", "Updates"] and headers[-2] == "Reward, less vmr-auto's"
        assert [row[0] for row in (base, *rows)] == ["base", *arms]
        assert rows[-1][-2] == "" != rows[0][-2] and {row[-1] for row in rows} == {""}  # of one seed

    def test_what_auto_chose(self, split):
        results = json.loads((split[0] / "results.json").read_text())
        assert list(results["choices"]) == ["1", "2"]
        assert sum(of["share_of_updates"] for of in results["choices"].values()) == pytest.approx(1)
        assert "## What auto chose" in (split[0] / "results.md").read_text()

    def test_figures(self, split):
        assert all(is_drawn(split[0] / name) for name in ("curves.png", "scores.png", "path.png"))

    def test_goes_on(self, split, script, capsys):
        out, printed, options = split
        before = finished(out)
        shutil.rmtree(out / "vmr-m2" / "seed0")
        assert script("split").main(options) == 0
        told = capsys.readouterr()
        assert told.err.count("finished earlier") == 3 and told.err.count("evaluating on") == 1
        assert told.out == printed
        after = finished(out)
        assert {name for name in after if before[name] != after[name]} == {"vmr-m2/seed0"}
        message = refused(script("split").main, *options, "--eta", "0.5")
        assert "eta=1.0, and now it is 0.5" in message


class TestTree:
    def test_arms(self, weights, script):
        module = script("tree")
        args = module.parse("", "tree", [*weights, *COMPARE, "--group-size", "4"], ["vmr", "tree"])
        comparison = module.Comparison(args)
        cells = script("question").plan_of(comparison, module.ARMS, [3])
        assert [(cell.label, cell.seed) for cell in cells] == [
            (arm, 3) for arm in ("grpo", "vmr+panw+mp", "tree", "tree+panw+mp")
        ]
        made = [str(comparison.agent(cell)) for cell in cells]
        assert made[0] == "GRPO()" and made[2].startswith("TreeGRPO(") and made[3].startswith("MaskPropagation(PANW(")

    def test_processes_with_seeds_of_their_own_share_a_folder(self, weights, script, tmp_path, monkeypatch, capsys):
        module = script("tree")
        monkeypatch.setattr(module, "ARMS", [module.ARMS[0], module.ARMS[2]])
        options = [*weights, *COMPARE, "--images", "8", "--group-size", "4", "--branching", "(2, 2)", "--seeds"]
        for seeds in (["1"], ["0"], ["0", "1"]):
            assert module.main([*options, *seeds, "--out", str(tmp_path)]) == 0
        told = capsys.readouterr()
        assert told.err.count("finished earlier") == 4 and told.err.count("base: evaluating") == 1
        results = json.loads((tmp_path / "results.json").read_text())
        assert [(run["agent"], run["seed"]) for run in results["runs"]] == [
            (arm, seed) for arm in ("grpo", "tree") for seed in (0, 1)
        ]
        apart = results["arms"]["tree"]["reward"]["difference"]
        assert "Does it pay not to throw" in (tmp_path / "report.html").read_text()
        assert list(apart["by_seed"]) == ["0", "1"] and apart["error"] == 0  # random images are all unreadable
        *_, last = rows_of("\n" + told.out.rpartition("| Arm")[1] + told.out.rpartition("| Arm")[2] + "\n\n", "")
        assert last[:2] == ["tree", "0, 1"] and last[-1] == "0.000"


class TestHindsight:
    def test_arms(self, weights, script):
        module = script("hindsight")
        args = module.parse("", "hindsight", [*weights, *COMPARE, "--hindsight-coef", "0.2"], ["hindsight"])
        comparison = module.Comparison(args)
        cells = script("question").plan_of(comparison, module.ARMS, [3])
        assert [cell.label for cell in cells] == ["grpo", "hindsight-letters", "hindsight-all"]
        made = [comparison.agent(cell) for cell in cells]
        assert [type(agent).__name__ for agent in made] == ["GRPO", "Hindsight", "Hindsight"]
        assert [(agent.hindsight_coef, agent.hindsight_tokens) for agent in made[1:]] == [
            (0.2, "letters"),
            (0.2, "all"),
        ]

    def test_trains_and_reports(self, weights, script, tmp_path, capsys):
        options = [*weights, *COMPARE, "--images", "8", "--seeds", "0", "--out", str(tmp_path)]
        assert script("hindsight").main(options) == 0
        arms = ["grpo", "hindsight-letters", "hindsight-all"]
        results = json.loads((tmp_path / "results.json").read_text())
        assert [run["agent"] for run in results["runs"]] == arms and results["reference"] == "grpo"
        assert all(run["budget"]["images"] == 8 for run in results["runs"])
        nothing = {"images": 0.0, "share": 0.0, "tokens": 0.0}  # random images are all unreadable
        assert results["relabelled"] == dict.fromkeys(arms[1:], nothing)
        rows = rows_of((tmp_path / "results.md").read_text(), "## Images relabelled")
        assert rows[1:] == [[arm, "0.0", "0.0%", "0%"] for arm in arms[1:]]
        printed = capsys.readouterr().out
        assert all(f"| {arm} " in printed for arm in arms) and is_drawn(tmp_path / "curves.png")

    def test_how_many_were_relabelled(self, script, tmp_path):
        for seed, counts in enumerate(([4, 8], [0, 2])):
            folder = tmp_path / "hindsight-all" / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [f"{64 * i},{count},{count / 64},{1.0 if count else ''}" for i, count in enumerate(counts)]
            header = "budget/images,hindsight/images,hindsight/share,hindsight/tokens"
            (folder / "progress.csv").write_text("\n".join([header, *lines]) + "\n")
        runs = [{"agent": arm, "seed": seed} for arm in ("grpo", "hindsight-all") for seed in (0, 1)]
        found = script("hindsight").relabelled(SimpleNamespace(out=tmp_path), runs)
        assert found == {"hindsight-all": {"images": 3.5, "share": 3.5 / 64, "tokens": 1.0}}


class Patches(Reward):
    """Scores the brightness, and has looked at a place that depends on the image; at none in every fifth."""

    name = "patches"

    def score(self, images, scenes):
        mean = images.mean((1, 2, 3)).astype(np.float32)
        sums = images.sum((1, 2, 3), dtype=np.int64)
        corners = [np.array([v % 48, v // 48 % 48]) for v in sums]
        boxes = [np.array([[*corner, *(corner + 9)]], np.float32) for corner in corners]
        words = [["SEEN"] if v % 5 else [] for v in sums]
        boxes = [box if read else box[:0] for box, read in zip(boxes, words, strict=True)]
        return RewardOutput(mean / 255, {}, words, [[0.5] * len(read) for read in words], boxes)


class TestSuffixSamples:
    @pytest.fixture
    def measuring(self, weights, script, tmp_path):
        """The script, its options, and a comparison whose images can be told apart."""
        module = script("suffix_samples")
        options = [*weights, *COMPARE, *MEASURE, "--seeds", "0", "--out", str(tmp_path)]
        args = module.parse("", "samples", options, ["vmr+panw+mp"], module.add_options)
        module.check(args)
        comparison = module.Comparison(args)
        comparison.env.reward = Patches()
        return module, args, comparison

    def test_arms(self, measuring, script):
        module, _, comparison = measuring
        masks = {"k1": ["none", "union"], "k2": ["none", *COMBINATIONS], "k4": ["none", *COMBINATIONS]}
        cells = script("question").plan_of(comparison, module.arms(), [0])
        assert [cell.label for cell in cells] == [f"{k}-{mask}" for k in masks for mask in masks[k]]
        methods = {cell.label: cell.method for cell in cells}
        assert (methods["k4-mean"]["suffix_samples"], methods["k4-mean"]["suffix_masks"]) == (4, "mean")
        assert "suffix_masks" not in methods["k2-none"] and module.REFERENCE in methods

    def test_measured(self, measuring):
        module, args, comparison = measuring
        batches = module.measured(comparison, args, [0, 1])
        assert [batch["suffix_samples"] for batch in batches] == [1, 1, 2, 2, 4, 4] * 2
        lines = {(line["suffix_samples"], line["mask"]): line for line in module.summarise(batches)}
        assert list(lines) == [(k, mask) for k in (1, 2, 4) for mask in ("none", *COMBINATIONS)]
        for k in (1, 2, 4):
            none, union, intersection, mean = (lines[k, mask] for mask in ("none", *COMBINATIONS))
            assert none["kept"] == [1, 1] and union["scales"] == ["1_1x1", "2_2x2"]
            kept = [line["kept"][1] for line in (intersection, mean, union)]
            assert len({*kept}) == 1 if k == 1 else kept[0] < kept[1] < kept[2]
            assert union["unread"] == none["unread"] and -1 <= none["reliability"][0] <= 1
            if k == 1:
                assert union["reliability"] == mean["reliability"] != none["reliability"]
        assert lines[4, "union"]["unread"] > lines[1, "union"]["unread"] > 0
        assert len(module.measured_table(list(lines.values())).splitlines()) == 2 + 12

    def test_goes_on_and_reports(self, weights, script, tmp_path, monkeypatch, capsys):
        module = script("suffix_samples")
        options = [*weights, *COMPARE, *MEASURE, "--images", "8", "--seeds", "0", "--out", str(tmp_path)]
        assert module.main([*options, "--stop-after", "measuring"]) == 0
        files = sorted((tmp_path / "measured").iterdir())
        assert [file.name for file in files] == [f"k{k}-seed0.json" for k in (1, 2, 4)]
        before = {file: json.loads(file.read_text())["config"] for file in files}
        files[1].unlink()
        monkeypatch.setattr(module, "arms", lambda: [module.Arm("k2-union", "vmr+panw+mp", {"suffix_samples": 2})])
        assert module.main(options) == 0
        told = capsys.readouterr()
        assert told.err.count("measuring K = ") == 3 + 1
        assert {file: json.loads(file.read_text())["config"] for file in files} == before
        table = module.measured_table(json.loads((tmp_path / "measured.json").read_text()))
        for name in ("measured.md", "results.md"):
            text = (tmp_path / name).read_text()
            assert table in text and "16 reward calls a batch" in text
        assert table in told.out and is_drawn(tmp_path / "measured.png")
        message = refused(module.main, *options, "--batches", "3")
        assert "and now it is" in message

    def test_signal_and_noise_of_halves_that_agree_and_disagree(self, script, monkeypatch):
        module = script("suffix_samples")
        g = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        agent = SimpleNamespace(policy=SimpleNamespace(schedule=ScaleSchedule([(1, 1), (2, 2), (4, 4)])))
        agent.unwrapped = agent
        for halves, signal, noise in (((g, g), 100, 0), ((g, -g), -100, 100)):
            monkeypatch.setattr(module, "half_gradients", lambda *args, halves=halves: (*halves, None))
            found = module.of_mask(agent, SimpleNamespace(grids=[0, 0]))
            assert found["signal"] == pytest.approx(signal) and found["noise"] == pytest.approx(noise)
            assert found["reliability"] == pytest.approx(math.copysign(1, signal))

    def test_the_share_that_prefixes_decide(self, script):
        batches = [
            {"suffix_samples": 2, "between": 0.2, "within": 0.4},
            {"suffix_samples": 4, "between": 0.3, "within": 0.3},
        ]
        decided = script("suffix_samples").decided
        found = [decided(batches, k) for k in (1, 2, 4)]
        assert found == pytest.approx([0.2 / 0.6, 0.2 / 0.4, 0.3 / 0.375])


@pytest.fixture(scope="module")
def out(weights, raster, tmp_path_factory):
    """The folder of both worlds."""
    out = tmp_path_factory.mktemp("questions") / "raster"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "questions")
        options = [*weights, *raster, *COMPARE, "--images", "8", "--seeds", "0", "--out", str(out)]
        assert import_module("raster").main(options) == 0
    return out


class TestRaster:
    def test_both_worlds(self, out):
        arms = {"var": ["grpo", "vmr", "vmr+panw"], "raster": ["grpo", "vmr"]}
        for world, expected in arms.items():
            results = json.loads((out / world / "results.json").read_text())
            assert [r["agent"] for r in results["runs"]] == expected
            assert results["runs"][1]["config"]["split"] == 2  # half of 64 px, and of four tokens
        gains = json.loads((out / "results.json").read_text())["gains"]
        assert [(row["world"], row["arm"]) for row in gains] == [(w, arm) for w in arms for arm in arms[w]]
        text = (out / "results.md").read_text()
        assert "](var/results.md)" in text and "](raster/results.md)" in text and is_drawn(out / "gains.png")

    def test_panw_is_nothing_on_a_raster(self, out, script):
        weights = json.loads((out / "results.json").read_text())["panw"]
        assert weights["raster"] == {"alpha": 0.6, "least": pytest.approx(1), "most": pytest.approx(1)}
        assert weights["var"]["least"] < 1 < weights["var"]["most"]
        schedule = ScaleSchedule.raster((8, 8))
        for alpha in (0.0, 0.6, 1.2):
            assert script("raster").panw_range(schedule, alpha) == pytest.approx((1, 1))
            assert len(panw_weights(schedule, alpha).unique()) == 1

    def test_one_world_goes_on_beside_the_other(self, out, weights, raster, script, capsys):
        before = finished(out)
        options = [*weights, *raster, *COMPARE, "--images", "8", "--seeds", "0", "--out", str(out)]
        assert script("raster").main([*options, "--worlds", "raster"]) == 0
        assert finished(out) == before
        assert "| var " in capsys.readouterr().out  # from what is there

    def test_a_missing_policy(self, weights, script, tmp_path):
        message = refused(script("raster").main, *weights, *COMPARE, "--raster-policy", "no.safetensors")
        assert "there is no no.safetensors: give --raster-policy, or leave raster out of --worlds" in message


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("split", ["--alpha", "0.5"], "no arm has the option --alpha: leave it out"),
        ("tree", ["--images", "0"], "--images must be at least 1, got 0"),
        ("tree", ["--forks", "9"], "9"),
        ("suffix_samples", ["--batch-images", "4"], "--batch-images must be a multiple of 8, at least 16, got 4"),
        ("suffix_samples", ["--batches", "0"], "--batches must be at least 1, got 0"),
        ("suffix_samples", ["--suffix-samples", "3"], "--suffix-samples is what is compared here"),
    ],
)
def test_wrong_options(name, options, message, weights, script, tmp_path):
    assert message in refused(script(name).main, *weights, *COMPARE, *options, "--out", tmp_path)
