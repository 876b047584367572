"""What the scripts of this folder share: arms on common ground, several seeds, and what came out.

An *arm* is an agent with some settings. All arms of a script have the budget, prompts, decoding and evaluation of
``examples/compare.py``, whose machinery, ``agents/experiments/runs.py``, this is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from agents import recipes
from agents.evaluation import bootstrap_interval
from agents.experiments import compare, figures, html_report, output, tables
from agents.experiments.agent_options import add_plugin_option
from agents.experiments.cells import METRICS, Cell, Result
from agents.experiments.options import INTERRUPTED, Parser, clear_errors, option_of
from agents.experiments.output import require_folder, table, write_json, write_text
from agents.experiments.run_options import add_run_options, finish
from agents.experiments.runs import Comparison
from agents.statistics import estimate

PRESETS = {name: compare.PRESETS[name] for name in ("quick", "full")}
SEEDS = {"quick": [0, 1, 2], "full": [0, 1, 2, 3, 4]}
GOING_ON = """
In --out: report.html, results.md, results.json, the figures, and for each run, an arm and a seed, what compare.py
writes for one. Finished runs are not trained again: the same command goes on after Ctrl-C. Several processes may share
one --out when each has --seeds of its own; a last call with all seeds trains nothing and collects everything. --seconds
caps a run's training, and is 0, no cap, unless given: arms that end early do not compare.
"""
INTERVALS = """\
All arms start from the same base policy and spend {images} reward calls a run: each image that is decoded and scored
counts one, so a prefix that VMR values from K suffixes costs K. Scores are those of {prompts} held-out prompts, one
image each, drawn with the same noise for all. Intervals: 95 %, bootstrap over prompts, an arm's seeds averaged prompt
by prompt. They do not tell how far another seed would end up; that is the standard error over seeds beside them, of
differences between runs of the same seed, which see the same training prompts."""


METRICS_DRAWN = ("reward", "word_accuracy")
__all__ = ["INTERRUPTED", "Arm", "Comparison", "clear_errors", "difference", "draw_intervals", "parse", "plt", "run"]
__all__ += ["table", "write_json", "write_results", "write_text"]


@dataclass(frozen=True)
class Arm:
    """An agent of a question: its name in tables, which is its folder too, its recipe, and the settings it changes."""

    label: str
    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)


# Running -------------------------------------------------------------------------------------------------------------


def parse(
    doc: str | None,
    name: str,
    argv: Sequence[str] | None,
    named: Sequence[str],
    add_options: Callable[[Parser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The options of a question.

    Args:
        doc: of the script, its help.
        name: of the folder under ``runs/questions`` where it writes by default.
        named: the recipes of all its arms; a setting that none of them has is an error.
        add_options: gives the parser the script's own options.
    """
    parser = Parser(f"{(doc or '').rstrip()}\n{GOING_ON}")
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="(default: %(default)s)")
    seeds = ", ".join(f"{' '.join(map(str, seeds))} in {preset}" for preset, seeds in SEEDS.items())
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=f"one run each (default: {seeds})")
    out = f"runs/questions/{name}-PRESET"
    parser.add_argument("--out", type=Path, help=f"folder for all that is written (default: {out})")
    add_plugin_option(parser)
    add_options(parser)
    add_run_options(parser, PRESETS)
    args = parser.parse_args(argv)
    with clear_errors():
        finish(args, PRESETS[args.preset])
        unused = args.method.keys() - {option for recipe in named for option in recipes.options_in(recipe)}
        if unused:
            raise ValueError(f"no arm has the option {option_of(min(unused))}: leave it out")
    args.seeds = list(dict.fromkeys(args.seeds or SEEDS[args.preset]))
    args.out = args.out or Path("runs/questions") / f"{name}-{args.preset}"
    with clear_errors():
        require_folder(args.out)
    return args


def plan_of(comparison: Comparison, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Cell]:
    """The runs of all arms, seed by seed, so that an early end leaves whole comparisons."""
    cells = [(arm, comparison.cell(arm.recipe, seed, **arm.changes)) for seed in seeds for arm in arms]
    return [replace(cell, label=arm.label) for arm, cell in cells]


def run(comparison: Comparison, arms: Sequence[Arm], seeds: Sequence[int], write: Callable[..., str]) -> int:
    """Train what is missing and write after each run; ``write(base, runs)`` gets the runs in the order of the arms."""
    with clear_errors():
        plan = plan_of(comparison, arms, seeds)
    order = [arm.label for arm in arms]

    def in_order(base: Result, results: list[Result]) -> str:
        return write(base, sorted(results, key=lambda run: order.index(run["agent"])))

    return comparison.run(plan, in_order)


# Reporting -----------------------------------------------------------------------------------------------------------


def difference(runs: Sequence[Result], others: Sequence[Result], metric: str) -> dict[str, Any]:
    """Of two arms, paired by seed and prompt: ``interval``, over prompts; ``by_seed``; their standard ``error``.

    Over the seeds that both have; empty without any.
    """
    mine, theirs = ({run["seed"]: run for run in arm} for arm in (runs, others))
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return {}
    pairs = np.array(
        [np.subtract(mine[seed]["prompts"][metric], theirs[seed]["prompts"][metric]) for seed in seeds]
    )  # (seeds, N)
    means = pairs.mean(1)
    error = float(means.std(ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None
    by_seed = {str(seed): float(mean) for seed, mean in zip(seeds, means, strict=True)}
    return {"interval": bootstrap_interval(pairs.mean(0)), "by_seed": by_seed, "error": error}


def summarise(base: Result, runs: Sequence[Result], reference: str) -> dict[str, Any]:
    """For each arm, the base policy among them: updates, and for each metric its ``mean`` and ``difference``."""
    of_arm = tables.by_agent(runs)
    found: dict[str, Any] = {"base": {"updates": 0.0, "seeds": []}}
    found["base"] |= {metric: {"mean": base["metrics"][metric], "difference": {}} for metric in METRICS}
    for arm, mine in of_arm.items():
        updates = float(np.mean([run["budget"]["updates"] for run in mine]))
        found[arm] = {"updates": updates, "seeds": [run["seed"] for run in mine]}
        for metric in METRICS:
            compared = {} if arm == reference else difference(mine, of_arm.get(reference, []), metric)
            mean = estimate(tables.scores_of(mine, metric), strata=tables.strata_of(base))
            found[arm][metric] = {"mean": mean, "difference": compared}
    return found


def arm_table(summary: Mapping[str, Any], reference: str) -> str:
    """One line an arm: the scores, and how far they are from the reference arm's."""
    headers = ["Arm", "Seeds", "Updates", "Reward", "Word Accuracy"]
    headers += [f"Reward, less {reference}'s", "s.e. over seeds"]
    rows = []
    for arm, of_arm in summary.items():
        scores = [tables.with_interval(of_arm[metric]["mean"]) for metric in ("reward", "word_accuracy")]
        compared = of_arm["reward"]["difference"]
        apart = ["", ""]
        if compared:
            error = compared["error"]
            apart = [tables.with_interval(compared["interval"], "+"), "" if error is None else f"{error:.3f}"]
        seeds = ", ".join(map(str, of_arm["seeds"]))
        rows.append([arm, seeds, f"{of_arm['updates']:.0f}", *scores, *apart])
    return table(headers, rows)


def write_results(
    comparison: Comparison,
    title: str,
    about: str,
    reference: str,
    base: Result,
    runs: Sequence[Result],
    sections: Sequence[str] = (),
    **more: Any,
) -> str:
    """Write results.md, results.json, report.html, curves.png and scores.png into the folder; returns the tables.

    Args:
        title, about: what is asked, and how it is answered.
        reference: the arm that the others are compared with.
        sections: more Markdown, after the table.
        more: more for results.json.
    """
    out, summary = comparison.out, summarise(base, runs, reference)
    content = {"question": title, "settings": comparison.described, "reference": reference, "arms": summary}
    headline = arm_table(summary, reference)
    intervals = INTERVALS.format(images=comparison.settings.images, prompts=len(comparison.test))
    text = [f"# {title}", about.strip(), headline, intervals, *sections]
    text += ["![Held-out reward and word accuracy while training](curves.png)", "![Scores](scores.png)"]
    text += ["## Runs", tables.run_table(runs)] if runs else []
    text += ["## Settings", tables.setting_list(comparison.described)]
    output.write_results(out, text, **content, **more, base=base, runs=list(runs))
    figures.draw_curves(out / "curves.png", out, runs, [("eval", "images"), ("eval", "updates")])
    panels = {METRICS[name]: {arm: of[name]["mean"] for arm, of in summary.items()} for name in METRICS_DRAWN}
    draw_intervals(out / "scores.png", panels)
    html_report.write(out)
    return "\n\n".join([headline, *sections])


def draw_intervals(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Panels side by side, each a point with its interval for every name: (mean, low, high)."""
    rows = max(len(values) for values in panels.values())
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 1.2 + 0.35 * rows), squeeze=False)
    for panel, (title, values) in zip(axes[0], panels.items(), strict=True):
        for y, (mean, low, high) in enumerate(values.values()):
            panel.plot([low, high], [y, y], color="C0")
            panel.plot(mean, y, "o", color="C0")
        panel.set_yticks(range(len(values)), list(values))
        panel.invert_yaxis()
        panel.set_title(title)
        panel.grid(alpha=0.3)
    figures.save_figure(path, figure)
