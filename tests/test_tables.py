"""The tables of a comparison, on results that are made by hand."""

import numpy as np
import pytest

from agents.experiments import tables
from agents.experiments.cells import METRICS

PROMPTS = [f'A sign that says "W{i}"' for i in range(30)] + [
    f'"A{i}" above "B{i}" in pink on a navy wall' for i in range(30)
]


def result(agent, seed, accuracy, stopped_at=None, rng=None, noise=0.0):
    """A run whose every score is about `accuracy`."""
    rng = rng or np.random.default_rng(0)
    scores = {metric: (accuracy + noise * rng.standard_normal(60)).tolist() for metric in METRICS}
    return {
        "agent": agent,
        "seed": seed,
        "finished": True,
        "stopped_at": stopped_at,
        "budget": {"images": stopped_at or 1600, "tokens": 1, "updates": 25, "seconds": 9.0},
        "diagnostics": {},
        "metrics": dict.fromkeys(METRICS, (accuracy, accuracy, accuracy)),
        "prompts": scores | {"prompt": PROMPTS, "read": [[]] * 60},
        "beside": {},
    }


def test_a_run_that_was_stopped_is_listed_and_compared_with_nobody():
    base = result("base", None, 0.2)
    runs = [result("grpo", 0, 0.5), result("vmr", 0, 0.9, stopped_at=640)]
    summary = tables.summarise(base, runs)
    assert list(summary) == ["grpo"]
    for text in (tables.comparison_table(base, summary), tables.words_table(base, runs)):
        assert "grpo" in text and "vmr" not in text
    assert "| stopped at 640 images, not compared |" in tables.run_table(runs)
    assert [run["agent"] for run in tables.complete(runs)] == ["grpo"]


def test_differences_and_probabilities():
    base, rng = result("base", None, 0.2), np.random.default_rng(1)
    runs = [result("grpo", seed, 0.5, rng=rng, noise=0.1) for seed in range(3)]
    runs += [result("vmr", seed, 0.3, rng=rng, noise=0.1) for seed in range(3)]
    found = tables.summarise(base, runs)["vmr"]["word_accuracy"]
    assert found["mean"][0] == pytest.approx(tables.scores_of(runs[3:], "word_accuracy").mean())
    assert found["difference"][0] == pytest.approx(found["mean"][0] - 0.2)
    value, low, high = found["to_first"]
    assert low < value < high < 0 and value == pytest.approx(-0.2, abs=0.03)
    assert found["better_than_first"][0] == 0.0
    text = tables.comparison_table(base, tables.summarise(base, runs))
    assert "Probability to beat grpo" in text and "0.00 [0.00, 0.00]" in text
    lines = [line for line in text.splitlines() if "| vmr " in line]
    assert "1.00 [1.00, 1.00]" in lines[-1]  # of nothing read, less is better


def test_power_is_told_from_two_seeds_on():
    base, rng = result("base", None, 0.2), np.random.default_rng(1)
    assert "known from two seeds on" in tables.power_text(base, [result("grpo", 0, 0.5)])
    runs = [result(agent, seed, 0.5, rng=rng, noise=0.1) for agent in ("grpo", "vmr") for seed in range(3)]
    text = tables.power_text(base, runs)
    assert text.startswith("- vmr against grpo: 3 seeds and 60 prompts see a difference of 0.0") and "takes" in text
    assert tables.power_text(base, runs[:3]).startswith("- grpo against base: 3 seeds")


def test_repair_and_what_is_beside():
    def record(right):
        names = ("letters_affected", "affected_right", "pairs_affected", "words_missing", "ink_affected", "ink_right")
        values = {name: [0.0] * 60 for name in names}
        values |= {"letters_affected": [4.0] * 60, "affected_right": [right] * 60, "ink_right": [None] * 60}
        extra = ("affected_confused", "affected_other", "letters_plain", "plain_right", "plain_other", "words_asked")
        return values | {n: [1.0] * 60 for n in (*extra, "words_shown", "lines_shown", "ground_right", "contrast")}

    base, run = result("base", None, 0.2) | {"beside": record(1.0)}, result("grpo", 0, 0.5) | {"beside": record(2.5)}
    summary = tables.summarise(base, [run])
    assert summary["grpo"]["repaired"]["letter"][0] == pytest.approx(1 - (1.5 / 4) / (3 / 4))
    (line,) = tables.repair_table(summary).splitlines()[2:]
    assert "| 0.500 [" in line and line.count("|") == 5 and line.rstrip("| ").endswith("]")  # no pair, no ink: blank
    assert "| 0.625 " in tables.beside_table(base, [run])
    assert tables.beside_table(base, [run | {"kl": [12.34, 11.0, 13.0]}]).splitlines()[3].rstrip("| ").endswith("12.3")
    assert tables.repair_table(tables.summarise(result("base", None, 0.2), [result("grpo", 0, 0.5)])) == ""


def test_temperatures_are_shown_where_one_moved():
    def having(result, *temperatures):
        return result | {
            "diagnostics": {f"temperature_{t}": x for t, x in zip(("1_1x1", "2_2x2"), temperatures, strict=True)}
        }

    base = having(result("base", None, 0.2), 0.8, 0.8)
    frozen, moved = having(result("grpo", 0, 0.5), 0.8, 0.8), having(result("vmr", 0, 0.5), 0.8, 0.9)
    assert tables.temperature_table(base, [frozen]) == ""
    lines = tables.temperature_table(base, [frozen, moved]).splitlines()
    assert "2x2" in lines[0] and lines[-1].split("|")[3].strip() == "0.900" and len(lines) == 5
    assert tables.temperature_table(result("base", None, 0.2), [result("grpo", 0, 0.5)]) == ""
