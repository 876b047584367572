"""The benchmark at a tiny size: what it measures makes sense, whatever the machine."""

import json
import time

import pytest
import torch
from test_examples import module, run, weights

__all__ = ["module", "weights"]  # fixtures


def test_numbers(weights, tmp_path):
    options = ["--images", 4, "--group-size", 2, "--repeats", 2, "--json", tmp_path / "bench.json"]
    printed = run("bench", *weights, *options)
    written = json.loads((tmp_path / "bench.json").read_text())
    values = {line["name"]: line["value"] for line in written["measured"]}
    assert all(value > 0 for value in values.values())
    assert sum(value for name, value in values.items() if name.startswith("share of ")) == pytest.approx(100)
    assert values["environment's own share of a rollout"] < 50
    assert values["OCR, images with the same text"] == 100
    assert {line["name"] for line in written["measured"] if line["met"] is not None} == {
        "environment's own share of a rollout",
        "OCR ms/image",
        "OCR, times faster than the defaults",
        "OCR, words read right",
        "cached sampling, times faster",
        "VMR prefix iteration, against its token counts",
    }
    assert printed.count("PASS") + printed.count("FAIL") == 6
    peak = [value for name, value in values.items() if name.startswith("peak of the device in ")]
    assert len(peak) == 1
    forward, both = (values[f"{name}, an image"] for name in ("forward pass", "forward and backward pass"))
    assert 2.5 < both / forward <= 3, "every product has two more in the backward pass, but for the first ones"
    for name in ("cached sampling", "forward pass", "forward and backward pass"):
        rate = values[f"{name}, an image"] * values[f"{name}, images/s"] / 1000  # TFLOP/s
        assert values[f"{name}, share of the device's peak"] == pytest.approx(100 * rate / peak[0])
    growth = {name for name in values if ", time a token, " in name}
    assert growth == {
        f"{work}, time a token, {tokens} against 130 tokens"
        for work in ("update", "cached sampling")
        for tokens in (274, 530, 910)
    }
    assert written["machine"]["images"] == 4 and written["machine"]["device"] == "cpu"


def test_a_batch_of_whole_groups(module, capsys):
    with pytest.raises(SystemExit):
        module("bench").parse(["--images", "9", "--group-size", "2"])
    assert "--images must be a multiple of --group-size" in capsys.readouterr().err


def test_stopwatch_adds_up_and_leaves_no_trace(module):
    class Sleeper:
        def nap(self, seconds):
            time.sleep(seconds)
            return seconds

    before = Sleeper.nap
    with module("benchmark").stopwatch(Sleeper, "nap") as total:
        assert Sleeper().nap(0.02) == 0.02
        Sleeper().nap(0.03)
    assert 0.05 <= total[0] < 0.5
    assert Sleeper.nap is before


def test_operations_and_number_formats(module):
    bench, a, b = module("benchmark"), torch.ones(3, 4), torch.ones(4, 5)
    assert bench.operations(lambda: a @ b) == 2 * 3 * 4 * 5
    with bench.Formats() as formats, torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.linear(a, b.T, torch.ones(5))
    assert formats.count == {torch.bfloat16: 20}
