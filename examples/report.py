"""What a comparison writes: intervals and tables, learning curves, pictures before and after.

A *result* is a dict, as it stands in ``result.json``: ``agent``, ``seed`` (``None`` for the base policy), ``config``,
``finished``, ``budget`` (images, tokens, updates, seconds), ``metrics`` (mean and interval of each metric) and
``prompts``, lists in the order of the held-out prompts: the prompt, what was read, and every metric.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import table, write_json
from PIL import Image, ImageDraw, ImageFont

from agents.evaluation import Evaluation, bootstrap_interval
from agents.pictures import caption, sample_sheet

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no window

METRICS = {"reward": "OCR reward", "word_accuracy": "Word Accuracy", "ned": "NED", "nothing_read": "Nothing read"}
AXES = {
    "images": "images decoded (reward calls)",
    "tokens": "tokens sampled",
    "updates": "updates",
    "seconds": "seconds of sampling, scoring and updating",
}
SHOWN = 8  # prompts in a picture strip, the first ones
LABEL = 22  # px, the height of a strip's title

Result = dict[str, Any]


# Numbers -------------------------------------------------------------------------------------------------------------


def prompt_scores(evaluation: Evaluation) -> dict[str, list[float]]:
    """Every metric, prompt by prompt."""
    arrays = (evaluation.scores, evaluation.word_accuracy, evaluation.ned, evaluation.nothing_read)
    return {name: [round(float(value), 6) for value in array] for name, array in zip(METRICS, arrays, strict=True)}


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The part of a result that an evaluation gives: ``metrics`` and ``prompts``."""
    scores = prompt_scores(evaluation)
    return {
        "metrics": {name: bootstrap_interval(values) for name, values in scores.items()},
        "prompts": scores | {"prompt": [scene.prompt for scene in evaluation.scenes], "read": evaluation.words_read},
    }


def pooled(results: Sequence[Result], metric: str) -> np.ndarray:
    """One number a prompt, the mean over the seeds, ``(N,)``: prompts, not pictures, are what is resampled."""
    return np.mean([result["prompts"][metric] for result in results], axis=0)


def summarise(base: Result, runs: Sequence[Result]) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """For each agent and metric: ``mean`` and, paired prompt by prompt, the ``difference`` to the base policy.

    Each is (mean, low, high) with a 95 % bootstrap interval over the prompts.
    """
    agents = dict.fromkeys(run["agent"] for run in runs)
    of_agent = {agent: [run for run in runs if run["agent"] == agent] for agent in agents}
    return {
        agent: {
            metric: {
                "mean": bootstrap_interval(pooled(of_agent[agent], metric)),
                "difference": bootstrap_interval(pooled(of_agent[agent], metric) - pooled([base], metric)),
            }
            for metric in METRICS
        }
        for agent in agents
    }


def with_interval(value: Sequence[float], sign: str = "") -> str:
    """``0.512 [0.480, 0.544]``; ``sign="+"`` writes the sign of positive numbers too."""
    mean, low, high = (format(part, f"{sign}.3f") for part in value)
    return f"{mean} [{low}, {high}]"


def comparison_table(base: Result, runs: Sequence[Result]) -> str:
    """One line a metric and policy, grouped by metric."""
    summary = summarise(base, runs)
    rows = []
    for metric, title in METRICS.items():
        rows.append([title, "base", with_interval(base["metrics"][metric]), ""])
        for agent, of in summary.items():
            difference = with_interval(of[metric]["difference"], "+")
            rows.append(["", agent, with_interval(of[metric]["mean"]), difference])
    return table(["Metric", "Policy", "Mean [95 % interval]", "Difference to base, paired"], rows)


def run_table(runs: Sequence[Result]) -> str:
    """One line a run."""
    rows = []
    for run in runs:
        spent = run["budget"]
        note = "" if run["finished"] else "interrupted"
        means = [f"{run['metrics'][metric][0]:.3f}" for metric in METRICS]
        counts = [str(spent["images"]), str(spent["updates"]), f"{spent['seconds']:.0f}"]
        rows.append([run["agent"], str(run["seed"]), *counts, *means, note])
    return table(["Agent", "Seed", "Images", "Updates", "Training s", *METRICS.values(), "Note"], rows)


# Files ---------------------------------------------------------------------------------------------------------------


def write_report(out: Path, settings: dict[str, Any], base: Result, runs: Sequence[Result]) -> str:
    """Write ``results.json``, ``results.md``, ``before_after.png`` and ``curves.png``; returns the table."""
    headline = comparison_table(base, runs)
    content = {"settings": settings, "summary": summarise(base, runs), "base": base, "runs": list(runs)}
    write_json(out / "results.json", content)
    text = [
        f"# {out.name}",
        f"{len(base['prompts']['reward'])} held-out prompts, one picture each, the same noise for every policy. "
        "Intervals: 95 %, bootstrap over prompts; an agent's seeds are averaged prompt by prompt.",
        headline,
        *(["## Runs", run_table(runs)] if runs else []),
        "## Settings",
        "\n".join(f"- {name}: {value}" for name, value in settings.items()),
    ]
    (out / "results.md").write_text("\n\n".join(text) + "\n")
    first = {run["agent"]: run for run in reversed(runs)}  # each agent's first seed
    strips = {"base policy": out / "base" / "samples.png"}
    for agent, run in reversed(first.items()):
        strips[f"{agent}, after {run['budget']['images']} images"] = run_folder(out, agent, run["seed"]) / "samples.png"
    stack(strips).save(out / "before_after.png")
    draw_curves(out, runs)
    return headline


def run_folder(out: Path, agent: str, seed: int | None) -> Path:
    """Where a run keeps its TensorBoard events, ``progress.csv``, policy and result; ``None`` is the base policy's."""
    return out / agent if seed is None else out / agent / f"seed{seed}"


def save_strip(path: Path, evaluation: Evaluation) -> None:
    """The pictures of the first prompts in a row, with what was asked for, what was read, and the score."""
    shown = range(min(SHOWN, len(evaluation.scenes)))
    captions = [caption(evaluation.scenes[i].words, evaluation.words_read[i], evaluation.scores[i]) for i in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample_sheet(evaluation.images[: len(shown)], captions, len(shown))).save(path)


def stack(strips: dict[str, Path]) -> Image.Image:
    """Pictures one below the other, each under its title."""
    rows = {title: Image.open(path) for title, path in strips.items()}
    sheet = Image.new(
        "RGB", (max(row.width for row in rows.values()), sum(LABEL + row.height for row in rows.values())), "white"
    )
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(size=14), 0
    for title, row in rows.items():
        pen.text((2, y + 2), title, fill="black", font=font)
        sheet.paste(row, (0, y + LABEL))
        y += LABEL + row.height
    return sheet


# Curves --------------------------------------------------------------------------------------------------------------


def read_curve(path: Path, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of a ``progress.csv``, in the rows that have both."""
    if not path.is_file():
        return np.zeros(0), np.zeros(0)
    with path.open(newline="") as file:
        pairs = [(row[x], row[y]) for row in csv.DictReader(file) if row.get(x) and row.get(y)]
    values = np.array(pairs, np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def running_mean(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over windows of a twentieth of the curve, each at its middle."""
    window = max(1, len(y) // 20)
    kernel = np.ones(window) / window
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")


def draw_curves(out: Path, runs: Sequence[Result], axis: str = "images") -> None:
    """``curves.png``: a colour an agent, a thin line a seed, a thick one their mean, against one of `AXES`."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), sharex=True, squeeze=False)
    agents = list(dict.fromkeys(run["agent"] for run in runs))
    for row, metric in enumerate(("reward", "word_accuracy")):
        for column, (source, title) in enumerate((("rollout", "training samples"), ("eval", "held-out prompts"))):
            panel = panels[row][column]
            x_name = f"eval/{axis}" if source == "eval" else f"budget/{axis}"
            for agent in agents:
                curves = []
                for run in [run for run in runs if run["agent"] == agent]:
                    path = run_folder(out, agent, run["seed"]) / "progress.csv"
                    x, y = read_curve(path, x_name, f"{source}/{metric}")
                    curves.append(running_mean(x, y) if source == "rollout" else (x, y))
                draw_agent(panel, curves, agent, f"C{agents.index(agent) % 10}")
            panel.set_title(f"{METRICS[metric]}, {title}")
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel(AXES[axis])
    if agents:
        panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def draw_agent(panel: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]], agent: str, colour: str) -> None:
    """One agent's seeds and their mean, as far as all of them go."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return
    for x, y in curves:
        panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
    length = min(len(x) for x, _ in curves)
    x, y = (np.mean([curve[i][:length] for curve in curves], axis=0) for i in (0, 1))
    panel.plot(x, y, color=colour, linewidth=2, label=agent)
