"""The ablations at a tiny size: what they train, what they share, what they write, and how they go on."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_examples import COMPARE, module, refused, rows_of, run, weights

from var_env import ScaleSchedule

__all__ = ["module", "weights"]  # fixtures
SCHEDULE = ScaleSchedule([(1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8)], patch=8)  # that of the shipped world
CELLS = ["vmr-m1-k2", "vmr-m2-k2", "vmr-m3-k1", "vmr+panw-m2-k2-a0.6", "vmr+panw+mp-m2-k2-a0.6"]


@pytest.fixture(scope="module")
def ablated(weights, tmp_path_factory):
    """Two tables of one seed: their folder and what was printed."""
    out = tmp_path_factory.mktemp("runs") / "ablations"
    return out, run("ablate", "m", "mp", *weights, *COMPARE, "--seeds", 0, "--out", out)


def finished(out):
    """When each cell was finished."""
    return {path.parents[1].name: path.stat().st_mtime_ns for path in out.glob("*/seed*/result.json")}


class TestTables:
    def rows(self, module, name, fine=False):
        return module("ablations").TABLES[name].rows(SimpleNamespace(fine=fine), SCHEDULE)

    def test_the_middle_step(self, module):
        rows = self.rows(module, "m")
        assert [row.changes for row in rows] == [
            *({"split": m} for m in range(1, 6)),
            {"split": 6, "suffix_samples": 1},
        ]
        assert {row.recipe for row in rows} == {"vmr"} and "vanilla GRPO" in rows[-1].name
        shares = [1, 5, 14, 30, 66, 130]  # of 130 tokens; the paper's prefixes hold 2, 9, 37 and 100 % of 10,084
        assert [row.name.split(",")[0] for row in rows] == list("123456")
        assert all(f", {100 * share / 130:.1f} %" in row.name for share, row in zip(shares[:-1], rows, strict=False))
        papers = {row.changes["split"]: row.paper for row in rows if row.paper}
        assert {m: (paper.name, paper.word_accuracy) for m, paper in papers.items()} == {
            2: ("m_128, 2 % of the tokens", 0.6677),
            3: ("m_256, 9 % of the tokens", 0.6565),
            5: ("m_512, 37 % of the tokens", 0.6351),
            6: ("m_1024, 100 % of the tokens", 0.5741),
        }

    def test_alpha(self, module):
        alphas = [row.changes["alpha"] for row in self.rows(module, "alpha")]
        assert alphas == [0.0, 0.6, 0.8, 1.0, 1.2]
        fine = self.rows(module, "alpha", fine=True)
        assert [row.changes["alpha"] for row in fine] == [0.0, *(n / 10 for n in range(2, 15))]
        assert {row.changes["alpha"]: row.paper.ned for row in fine if row.paper} == {
            0.6: 0.8709,
            0.8: 0.8673,
            1.0: 0.8601,
            1.2: 0.8459,
        }

    def test_the_others(self, module):
        assert [row.recipe for row in self.rows(module, "mp")] == ["vmr+panw", "vmr+panw+mp"]
        assert [row.changes for row in self.rows(module, "alternation")] == [
            {"alternation": "fine"},
            {"alternation": "coarse"},
        ]
        assert [row.changes for row in self.rows(module, "k")] == [{"suffix_samples": k} for k in (1, 2, 4)]
        assert {row.recipe for row in self.rows(module, "k")} == {"vmr+panw+mp"}


class TestRuns:
    def test_cells(self, ablated):
        out, _ = ablated
        assert set(finished(out)) == set(CELLS)
        config = json.loads((out / "vmr-m3-k1" / "seed0" / "result.json").read_text())["config"]
        assert (config["split"], config["suffix_samples"]) == (3, 1) and "alpha" not in config
        updates = {
            run["agent"]: run["budget"]["updates"] for run in json.loads((out / "results.json").read_text())["runs"]
        }
        assert updates == dict.fromkeys(CELLS, 2) | {"vmr-m3-k1": 4}  # K = 2 pays twice for a prefix

    def test_results(self, ablated):
        out, printed = ablated
        text = (out / "results.md").read_text()
        headers, base, *rows = rows_of(text, "## The middle step (Table 3a, Figure 2)")
        assert headers == [
            *("m", "Seeds", "Updates", "OCR reward", "Word Accuracy", "NED"),
            *("Paper: m", "Word Accuracy", "NED"),
        ]
        assert base[0] == "base policy" and base[-3:] == ["NextFlow", "0.5536", "0.7816"]
        assert [row[:3] for row in rows] == [
            ["1, 4.8 % of the tokens", "0", "2"],
            ["2, 23.8 % of the tokens", "0", "2"],
            ["3, all tokens, K = 1: vanilla GRPO", "0", "4"],
        ]
        _, _, *rows = rows_of(text, "## Mask Propagation (Table 4a, Figure 7b)")
        assert [(row[0], row[-2]) for row in rows] == [("without", "0.6855"), ("with", "0.7071")]
        assert "from the same base policy on 16 reward calls" in text and "Table 5" not in text
        assert all(line in text for line in printed.splitlines() if line.startswith("|"))
        content = json.loads((out / "results.json").read_text())
        assert content["tables"]["mp"] == {"without": CELLS[3], "with": CELLS[4]}
        assert content["settings"]["split"] == "half" and content["base"]["agent"] == "base"
        page = (out / "report.html").read_text()
        assert "<option>mp</option>" in page and page.count('class="tile"') == 5 * (1 + len(CELLS))

    def test_figures(self, ablated):
        for name in ("m.png", "mp.png", "tokens_per_step.png"):
            image = np.asarray(Image.open(ablated[0] / name).convert("L"))
            assert image.std() > 10
        assert not (ablated[0] / "k.png").exists()

    def test_a_cell_is_trained_once(self, ablated, weights, module, capsys):
        out, _ = ablated
        before = finished(out)
        options = [*weights, *COMPARE, "--seeds", "0", "--out", str(out)]
        assert module("ablate").main(["alternation", *options]) == 0
        told = capsys.readouterr()
        assert "vmr+panw-m2-k2-a0.6, seed 0: finished earlier" in told.err
        assert told.err.count("evaluating on") == 1  # the coarse one
        after = finished(out)
        assert after.keys() - before.keys() == {"vmr+panw-m2-k2-a0.6-coarse"} and before.items() <= after.items()
        text = (out / "results.md").read_text()
        assert all(title in text for title in ("Table 3a", "Table 4a", "Table 4b"))  # those of the earlier call, too
        lost = out / "vmr-m1-k2" / "seed0" / "result.json"
        lost.unlink()
        assert module("ablate").main(["m", "mp", *options]) == 0
        assert capsys.readouterr().err.count("evaluating on") == 1
        again = finished(out)
        assert {name for name, written in again.items() if after.get(name) != written} == {"vmr-m1-k2"}

    def test_other_settings_need_another_folder(self, ablated, weights, module):
        options = [*weights, *COMPARE, "--seeds", "0", "--out", ablated[0]]
        assert "eta=1.0, and now it is 0.5" in refused(module("ablate").main, "m", *options, "--eta", "0.5")
        assert "images=16, and now it is 20" in refused(module("ablate").main, "k", *options, "--images", "20")

    def test_another_exponent_is_another_cell(self, ablated, weights, module):
        script = module("ablations")
        args = module("ablate").parse([*weights, *COMPARE, "--alpha", "0.8", "--split", "1", "--out", str(ablated[0])])
        comparison = script.Comparison(args)
        rows = [row for name in ("mp", "alternation", "k") for row in script.TABLES[name].rows(args, SCHEDULE)]
        cells = [cell for row in rows for cell in script.cells_of(row, comparison, [0, 1])]
        assert {str(cell) for cell in cells if cell.seed == 1} == {
            "vmr+panw-m1-k2-a0.8, seed 1",
            "vmr+panw-m1-k2-a0.8-coarse, seed 1",
            "vmr+panw+mp-m1-k1-a0.8, seed 1",
            "vmr+panw+mp-m1-k2-a0.8, seed 1",
            "vmr+panw+mp-m1-k4-a0.8, seed 1",
        }

    def test_interrupted_and_gone_on(self, weights, module, tmp_path, monkeypatch, capsys):
        ablate, runs = module("ablate"), module("runs")

        class CtrlC(runs.StopOnSignal):
            """Presses it in the second run."""

            def _on_step(self):
                second = (tmp_path / CELLS[3] / "seed0" / "result.json").is_file()
                if second and not self.interrupt.requested:
                    os.kill(os.getpid(), signal.SIGINT)
                return super()._on_step()

        options = ["mp", *weights, *COMPARE, "--seeds", "0", "--out", str(tmp_path)]
        with monkeypatch.context() as patch:
            patch.setattr(runs, "StopOnSignal", CtrlC)
            assert ablate.main(options) == 130
        told = capsys.readouterr()
        assert "0 (interrupted)" in told.out and "goes on with the runs that are missing" in told.out
        first, second = (tmp_path / cell / "seed0" / "result.json" for cell in CELLS[3:])
        interrupted, written = json.loads(second.read_text()), first.stat().st_mtime_ns
        assert not interrupted["finished"] and interrupted["budget"]["images"] == 8
        assert ablate.main(options) == 0
        assert "(interrupted)" not in capsys.readouterr().out
        result = json.loads(second.read_text())
        assert result["finished"] and result["budget"]["images"] == 16 and first.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["beta"], "unknown table 'beta': choose of m, alpha, mp, alternation, k"),
        (["m", "--images", "0"], "--images must be at least 1, got 0"),
        (["k", "--split", "3"], "leaves no suffix to sample 2 times"),
        (["mp", "--dilation", "-1"], "dilation must be a whole number of at least 0, got -1"),
    ],
)
def test_wrong_options(options, message, weights, module, tmp_path):
    assert message in refused(module("ablate").main, *options, *(weights), "--out", tmp_path)
