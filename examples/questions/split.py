"""Where should VMR split, and can it find out by itself? Every fixed m against split="auto", at equal reward calls.

    python examples/questions/split.py                            # three seeds, about an hour on two cores
    python examples/questions/split.py --preset full --seeds 0    # hours: one process of several, with a seed each
    python examples/questions/split.py --suffix-samples 4 --out runs/questions/split-k4

Arms: vmr with every split m (of a schedule with many grids, those that the rule may choose), vmr with split="auto",
and grpo, which does not split. The rule, and what it is based on, is in agents/split_rule.py. Fixed splits are compared
with auto. Beside the scores: how often auto took which m, and for each m the share of the reward's variance that the
prefix decides and what the rule makes of it, both as auto measured them in its last updates.

In --out, too: path.png, the split that auto took over time, and what it measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from question import Arm, Comparison, clear_errors, parse, plt, run, table, write_results

from agents.experiments.cells import AXES, Result
from agents.experiments.figures import read_curve, run_folder, save_figure
from agents.split_rule import SplitRule

AUTO = "vmr-auto"
TITLE = "Where should VMR split, and can it find out by itself?"
ABOUT = """
VMR with every fixed m, and with `split="auto"`, which chooses m before every update from the variances of the returns
that its own batches show (agents/split_rule.py). Vanilla GRPO stands beside them: it has no split.
"""


def arms_of(comparison: Comparison) -> list[Arm]:
    fixed = [Arm(f"vmr-m{m}", "vmr", {"split": m}) for m in splits_of(comparison)]
    return [Arm("grpo", "grpo"), *fixed, Arm(AUTO, "vmr", {"split": "auto"})]


def splits_of(comparison: Comparison) -> list[int]:
    return SplitRule(comparison.base.schedule.sizes).candidates


def last(path: Path, column: str) -> float:
    """The last number of a column of a ``progress.csv``; NaN without any."""
    _, values = read_curve(path, column, column)
    return float(values[-1]) if len(values) else float("nan")


def choices(comparison: Comparison, runs: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """For each m: the share of auto's updates that took it, the variance decided by its prefix, and its worth.

    Means over auto's runs.
    """
    files = [run_folder(comparison.out, AUTO, run["seed"]) / "progress.csv" for run in runs if run["agent"] == AUTO]
    taken = [read_curve(path, "budget/images", "vmr/split")[1] for path in files]
    found = {}
    for m in splits_of(comparison) if files else []:
        found[str(m)] = {
            "share_of_updates": float(np.mean([(splits == m).mean() for splits in taken])),
            "decided": float(np.mean([last(path, f"vmr/decided_m{m}") for path in files])),
            "worth": float(np.mean([last(path, f"vmr/worth_m{m}") for path in files])),
        }
    return found


def choice_table(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [m, f"{of['share_of_updates']:.0%}", f"{of['decided']:.1%}", f"{of['worth']:.3f}"] for m, of in found.items()
    ]
    return table(["m", "Auto's updates there", "Decided by the prefix", "Worth by the rule"], rows)


def draw_path(comparison: Comparison, runs: Sequence[Result]) -> None:
    """The split over time, a line a seed, and the worth that was measured, a line an m, means over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
    folders = [run_folder(comparison.out, AUTO, run["seed"]) for run in runs if run["agent"] == AUTO]
    for i, folder in enumerate(folders):
        x, splits = read_curve(folder / "progress.csv", "budget/images", "vmr/split")
        left.step(x, splits + 0.06 * i, where="post", label=folder.name)  # apart, so that all are seen
    for m in splits_of(comparison):
        curves = [read_curve(folder / "progress.csv", "budget/images", f"vmr/worth_m{m}") for folder in folders]
        length = min((len(x) for x, _ in curves), default=0)
        if length:
            right.plot(curves[0][0][-length:], np.mean([y[-length:] for _, y in curves], 0), label=f"m = {m}")
    left.set_title("split of each update")
    right.set_title("what the rule compares")
    for panel in (left, right):
        panel.set_xlabel(AXES["images"])
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize="small")
    save_figure(comparison.out / "path.png", figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "split", argv, ["grpo", "vmr"])
    with clear_errors():
        comparison = Comparison(args)
        arms = arms_of(comparison)

    def write(base: Result, runs: list[Result]) -> str:
        found = choices(comparison, runs)
        sections = ["## What auto chose", choice_table(found), "![The split over time](path.png)"] if found else []
        draw_path(comparison, runs)
        return write_results(comparison, TITLE, ABOUT, AUTO, base, runs, sections, choices=found)

    return run(comparison, arms, args.seeds, write)


if __name__ == "__main__":
    sys.exit(main())
