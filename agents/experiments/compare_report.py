"""What `vartext compare` writes: results.md, results.json, the figures and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.common.files import replacing
from agents.experiments import figures, html_report, tables
from agents.experiments.cells import AXES, Result
from agents.experiments.output import write_results


def write_report(
    out: Path, settings: dict[str, Any], base: Result, runs: Sequence[Result], axis: str = "images"
) -> str:
    """Write ``results.json``, ``results.md``, the figures and ``report.html``, see compare.py; returns the table."""
    summary = tables.summarise(base, runs)
    headline = tables.comparison_table(base, summary)
    prompts, stopped = len(base["prompts"]["reward"]), len(runs) - len(tables.complete(runs))
    text = [
        f"# {out.name}",
        f"{prompts} held-out prompts, one image each, the same noise for every policy. Intervals: 95 %, bootstrap over "
        "seeds and prompts, differences paired by prompt. The probability to beat another agent is that of a run of "
        "the one against a run of the other.",
        headline,
    ]
    if stopped:
        text.append(f"{stopped} runs were stopped before their budget. They stand under Runs, and are not compared.")
    sections = [
        ("Power", "", tables.power_text(base, runs) if summary else ""),
        (
            "Interquartile means of the reward",
            "The mean of the middle half of all scores, which outliers do not move (Agarwal et al., arXiv 2108.13264).",
            "\n".join(f"- {agent}: {tables.with_interval(of['iqm'])}" for agent, of in summary.items()),
        ),
        (
            "Planted faults repaired",
            "1 - (rate of faults) / (rate of the base policy), by family; docs/faults.md. The colour is a probe: no "
            "reward for text can see it.",
            tables.repair_table(summary),
        ),
        ("Beside the reward", "What the reward does not see, or does not tell apart.", tables.beside_table(base, runs)),
        ("Word Accuracy by the number of words", "", tables.words_table(base, runs)),
        (
            "Learned temperatures",
            "The policy has one learned temperature for each grid. Below that of the base policy it is more certain, "
            "which raises the scores by itself; read a gain beside them.",
            tables.temperature_table(base, runs),
        ),
        ("Runs", "", tables.run_table(runs) if runs else ""),
        ("Settings", "", tables.setting_list(settings)),
    ]
    for title, about, body in sections:
        text += [f"## {title}", *([about] if about else []), body] if body else []
    write_results(out, text, settings=settings, summary=summary, base=base, runs=list(runs))
    draw(out, base, runs, axis)
    html_report.write(out)
    return headline


def draw(out: Path, base: Result, runs: Sequence[Result], axis: str) -> None:
    """The figures: before_after.png, curves.png, budgets.png, frontier.png, repair.png and profile.png."""
    first = {run["agent"]: run for run in reversed(runs)}  # each agent's first seed
    strips = {"base policy": out / "base" / "samples.png"}
    for agent, run in reversed(first.items()):
        title = f"{agent}, after {run['budget']['images']} images"
        strips[title] = figures.run_folder(out, agent, run["seed"]) / "samples.png"
    with replacing(out / "before_after.png") as part:
        figures.stack(strips).save(part)
    figures.draw_curves(out / "curves.png", out, runs, [("rollout", axis), ("eval", axis)])
    figures.draw_curves(out / "budgets.png", out, runs, [("eval", budget) for budget in AXES])
    if any("kl" in run for run in runs):  # earlier versions did not measure it
        figures.draw_frontier(out / "frontier.png", out, runs)
    figures.draw_repair(out / "repair.png", out, runs)
    figures.draw_profile(out / "profile.png", base, runs)
