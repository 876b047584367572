"""The paper's ablations: their tables, the cells of each, and the report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from agents.experiments import figures, html_report
from agents.experiments.agent_options import settings_of
from agents.experiments.cells import METRICS as TITLES
from agents.experiments.cells import Cell, Result
from agents.experiments.options import clear_errors
from agents.experiments.output import table, write_results
from agents.experiments.runs import Comparison
from agents.experiments.tables import (
    complete,
    repair_table,
    repaired_by,
    scores_of,
    setting_list,
    strata_of,
    with_interval,
)
from agents.statistics import estimate
from var_env import ScaleSchedule

METRICS = ("reward", "word_accuracy", "ned")


class Paper(NamedTuple):
    """A row of the paper: NextFlow, 7B, 1024 px, on CVTG-2K."""

    name: str
    word_accuracy: float
    ned: float


PAPER_BASE = Paper("NextFlow", 0.5536, 0.7816)
PAPER_M = {1024: (0.5741, 0.7871), 512: (0.6351, 0.8236), 256: (0.6565, 0.8429), 128: (0.6677, 0.8501)}
PAPER_ALPHA = {0.6: (0.7136, 0.8709), 0.8: (0.7051, 0.8673), 1.0: (0.6855, 0.8601), 1.2: (0.6602, 0.8459)}
PAPER_K = {1: (0.6575, 0.8388), 2: (0.6821, 0.8505), 4: (0.6720, 0.8449)}


# The tables ----------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A cell of a table for each seed, and the paper's row to put beside it."""

    name: str
    recipe: str
    changes: dict[str, Any]
    paper: Paper | None = None


def prefix_share(schedule: ScaleSchedule, m: int) -> float:
    """The share of all tokens that the first m grids hold."""
    return sum(schedule.sizes[:m]) / schedule.total_tokens


def paper_middle_steps(schedule: ScaleSchedule) -> dict[int, Paper]:
    """The paper's rows by our m, that whose prefix has the nearest share of all tokens, as a ratio."""
    theirs, rows = ScaleSchedule.nextflow(1024), {}
    for resolution, scores in PAPER_M.items():
        share = prefix_share(theirs, theirs.split(resolution=resolution))
        distance = {m: abs(math.log(prefix_share(schedule, m) / share)) for m in range(1, len(schedule) + 1)}
        rows[min(distance, key=distance.__getitem__)] = Paper(
            f"m_{resolution}, {100 * share:.0f} % of the tokens", *scores
        )
    return rows


def m_rows(args: argparse.Namespace, schedule: ScaleSchedule) -> list[Row]:
    paper, last = paper_middle_steps(schedule), len(schedule)
    names = {m: f"{m}, {100 * prefix_share(schedule, m):.1f} % of the tokens" for m in range(1, last)}
    rows = [Row(name, "vmr", {"split": m}, paper.get(m)) for m, name in names.items()]
    vanilla = {"split": last, "suffix_samples": 1}
    return [*rows, Row(f"{last}, all tokens, K = 1: vanilla GRPO", "vmr", vanilla, paper.get(last))]


def alpha_rows(args: argparse.Namespace, schedule: ScaleSchedule) -> list[Row]:
    alphas = {0.0, *PAPER_ALPHA} | ({n / 10 for n in range(2, 15)} if args.fine else set())
    paper = {alpha: Paper(f"{alpha}", *scores) for alpha, scores in PAPER_ALPHA.items()}
    names = {alpha: f"{alpha}" + ", the token mean" * (alpha == 0) for alpha in sorted(alphas)}
    return [Row(name, "vmr+panw", {"alpha": alpha}, paper.get(alpha)) for alpha, name in names.items()]


def mp_rows(args: argparse.Namespace, schedule: ScaleSchedule) -> list[Row]:
    without, propagated = Paper("NextFlow-RL w/o MP", 0.6855, 0.8601), Paper("NextFlow-RL w/ MP", 0.7071, 0.8699)
    return [Row("without", "vmr+panw", {}, without), Row("with", "vmr+panw+mp", {}, propagated)]


def alternation_rows(args: argparse.Namespace, schedule: ScaleSchedule) -> list[Row]:
    paper = {"fine": Paper("fine-grained", 0.6855, 0.8601), "coarse": Paper("coarse-grained", 0.6778, 0.8564)}
    return [Row(name, "vmr+panw", {"alternation": name}, row) for name, row in paper.items()]


def k_rows(args: argparse.Namespace, schedule: ScaleSchedule) -> list[Row]:
    return [Row(f"{k}", "vmr+panw+mp", {"suffix_samples": k}, Paper(f"{k}", *scores)) for k, scores in PAPER_K.items()]


@dataclass(frozen=True)
class Table:
    """An ablation; ``rows`` gets the options and the schedule."""

    title: str
    column: str
    about: str
    rows: Callable[[argparse.Namespace, ScaleSchedule], list[Row]]


TABLES = {
    "m": Table(
        "The middle step (Table 3a, Figure 2)",
        "m",
        "VMR alone. The prefix has m grids; a paper's row stands beside the m whose prefix has the nearest share of "
        "all tokens, as a ratio. With m = T there is no suffix, and VMR is vanilla GRPO. The paper's rows are after "
        "300 updates.",
        m_rows,
    ),
    "alpha": Table(
        "The decay exponent of PANW (Table 3b, Figure 7a)",
        "alpha",
        "VMR and PANW, k_t = (h_t w_t)^-alpha. The paper's rows are after 400 updates; it has none for 0.",
        alpha_rows,
    ),
    "mp": Table(
        "Mask Propagation (Table 4a, Figure 7b)",
        "MP",
        "VMR and PANW, with and without MP. The paper's rows are after 400 updates; the one without MP has the scores "
        "of alpha = 1.0 in its Table 3b.",
        mp_rows,
    ),
    "alternation": Table(
        "Alternation of prefix and suffix updates (Table 4b)",
        "alternation",
        "VMR and PANW. Fine: a few prefix updates, then a suffix update, again and again. Coarse: all prefix updates, "
        "then all suffix updates, in the same proportion. The paper's rows are after 400 updates; the fine one has the "
        "scores of alpha = 1.0 in its Table 3b.",
        alternation_rows,
    ),
    "k": Table(
        "Suffixes a prefix (Table 5)",
        "K",
        "VMR, PANW and MP. K suffixes cost K images of the budget, so a larger K has fewer updates. The paper's rows "
        "are after 300 updates each, whatever K costs.",
        k_rows,
    ),
}
ABOUT = """\
Every cell is trained from the same base policy on {images} reward calls: each image that is decoded and scored counts
one, so a prefix that VMR values from K suffixes costs K. The scores are those of {prompts} held-out prompts, one
image each, drawn with the same noise for all. Intervals: 95 %, bootstrap over prompts, a cell's seeds averaged prompt
by prompt. They do not tell how far another seed would end up: see the thin lines, one a seed, in the figures.

The paper's rows are of NextFlow, a policy of 7B parameters at 1024 px, on the prompts of CVTG-2K. Compare orders, not
heights."""

REPAIRED = "Planted faults repaired, 1 - (rate of faults) / (rate of the base policy), by family:"


# Cells ---------------------------------------------------------------------------------------------------------------


def cells_of(row: Row, comparison: Comparison, seeds: Sequence[int]) -> list[Cell]:
    """The runs of a row, labelled by what they are: the same settings, the same label, in whatever table."""
    cells = [comparison.cell(row.recipe, seed, **row.changes) for seed in seeds]
    return [replace(cell, label=label_of(cell)) for cell in cells]


def label_of(cell: Cell) -> str:
    """Such as ``vmr+panw-m4-k2-a0.6``, by the settings that are ablated."""
    method = cell.method
    label = f"{cell.recipe}-m{method['split']}-k{method['suffix_samples']}"
    label += f"-a{method['alpha']:g}" if "alpha" in method else ""
    return label + ("-coarse" if method["alternation"] == "coarse" else "")


# The report ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A row with its finished runs."""

    row: Row
    runs: list[Result]


def markdown(column: str, base: Result, lines: Sequence[Line]) -> str:
    """Ours and the paper's side by side."""
    scores = [with_interval(base["metrics"][metric]) for metric in METRICS]
    rows = [["base policy", "", "0", *scores, *paper_columns(PAPER_BASE)]]
    for row, runs in lines:
        seeds = ", ".join(f"{run['seed']}" + " (interrupted)" * (not run["finished"]) for run in runs)
        updates = sum(run["budget"]["updates"] for run in runs) / len(runs)
        scores = [with_interval(estimate(scores_of(runs, metric), strata=strata_of(base))) for metric in METRICS]
        rows.append([row.name, seeds, f"{updates:.0f}", *scores, *paper_columns(row.paper)])
    ours = [column, "Seeds", "Updates", *(TITLES[metric] for metric in METRICS)]
    return table([*ours, f"Paper: {column}", "Word Accuracy", "NED"], rows)


def paper_columns(paper: Paper | None) -> list[str]:
    return ["", "", ""] if paper is None else [paper.name, f"{paper.word_accuracy:.4f}", f"{paper.ned:.4f}"]


def write_report(comparison: Comparison, base: Result, found: dict[str, list[Line]]) -> str:
    """Write ``results.json``, ``results.md``, ``report.html`` and a figure a table of ``found``; returns the tables."""
    out = comparison.out
    described = {**comparison.described, **settings_of("vmr+panw+mp", comparison.method)}  # where no row changes them
    runs = {(run["agent"], run["seed"]): run for lines in found.values() for line in lines for run in line.runs}
    labels = {name: {line.row.name: line.runs[0]["agent"] for line in lines} for name, lines in found.items()}
    about = ABOUT.format(images=comparison.settings.images, prompts=len(comparison.test))
    text, printed = [f"# Ablations: {out.name}", about], []
    for name, lines in found.items():
        shown, title = TABLES[name], f"## {TABLES[name].title}"
        printed += [title, markdown(shown.column, base, lines)]
        faults = repair_table({line.row.name: repaired_by(base, complete(line.runs)) for line in lines}, shown.column)
        text += [title, shown.about, printed[-1], *([REPAIRED, faults] if faults else [])]
        text += [f"![{shown.title}: curves on validation prompts]({name}.png)"]
        legend = {line.runs[0]["agent"]: f"{shown.column} = {line.row.name}" for line in lines}
        figures.draw_curves(
            out / f"{name}.png",
            out,
            [run for line in lines for run in line.runs],
            [("eval", "images"), ("eval", "updates")],
            legend,
        )
    text += ["## Tokens per step (Figure 1)", "![Tokens of every step, ours and the paper's](tokens_per_step.png)"]
    text += ["## Settings", setting_list(described)]
    write_results(out, text, settings=described, tables=labels, base=base, runs=list(runs.values()))
    html_report.write(out)
    return "\n\n".join(printed)


def run(args: argparse.Namespace) -> int:
    with clear_errors():
        comparison = Comparison(args)
        schedule = comparison.base.schedule
        tables = {name: table_of.rows(args, schedule) for name, table_of in TABLES.items()}
        cells = {name: [cells_of(row, comparison, args.seeds) for row in rows] for name, rows in tables.items()}
        plan = list(dict.fromkeys(cell for name in args.tables for row in cells[name] for cell in row))
        others = {cell for rows in cells.values() for row in rows for cell in row} - {*plan}
        earlier = {cell: result for cell in others if (result := comparison.finished(cell)) is not None}
        theirs = ScaleSchedule.nextflow(1024)
        figures.draw_tokens(args.out / "tokens_per_step.png", {"VARText": schedule, "NextFlow, 1024 px": theirs})

    def write(base: Result, results: list[Result]) -> str:
        known = {(result["agent"], result["seed"]): result for result in (*earlier.values(), *results)}
        found: dict[str, list[Line]] = {}
        for name, rows in tables.items():
            of_rows = [[known.get((cell.label, cell.seed)) for cell in row] for row in cells[name]]
            lines = [Line(row, [run for run in runs if run]) for row, runs in zip(rows, of_rows, strict=True)]
            enough = any if name in args.tables else all
            if enough(line.runs for line in lines):
                found[name] = [line for line in lines if line.runs]
        printed = write_report(comparison, base, found)
        figure_names = ["tokens_per_step.png", *(f"{name}.png" for name in found)]
        files = ", ".join(["report.html", "results.md", "results.json", *figure_names])
        return f"{printed}\n\n{args.out}: {files}; tensorboard --logdir {args.out}"

    return comparison.run(plan, write)
