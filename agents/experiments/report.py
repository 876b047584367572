"""What `vartext compare` and `vartext ablate` write: intervals and tables, learning curves, pictures before and after.

A *result* is a dict, as it stands in ``result.json``: ``agent``, ``seed`` (``None`` for the base policy), ``config``,
``finished``, ``budget`` (images, tokens, updates, seconds), ``diagnostics`` of the policy, such as its temperatures,
``metrics`` (mean and interval of each metric) and ``prompts``, lists in the order of the held-out prompts: the prompt,
what was read, and every metric.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from agents.common.files import replacing
from agents.common.pictures import caption, sample_sheet
from agents.evaluation import Evaluation, bootstrap_interval
from agents.experiments.cells import AXES, METRICS, Result
from agents.experiments.output import table, write_json, write_text
from var_env import ScaleSchedule
from var_env.scenes import quoted_words

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no window

SOURCES = {"rollout": "training samples", "eval": "held-out prompts"}
SHOWN = 8  # prompts in a picture strip, the first ones
LABEL = 22  # px, the height of a strip's title


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
    of_agent = by_agent(runs)
    return {
        agent: {
            metric: {
                "mean": bootstrap_interval(pooled(of_agent[agent], metric)),
                "difference": bootstrap_interval(pooled(of_agent[agent], metric) - pooled([base], metric)),
            }
            for metric in METRICS
        }
        for agent in of_agent
    }


def by_agent(runs: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each agent, in the order of their first ones."""
    agents = dict.fromkeys(run["agent"] for run in runs)
    return {agent: [run for run in runs if run["agent"] == agent] for agent in agents}


def with_interval(value: Sequence[float], sign: str = "") -> str:
    """``0.512 [0.480, 0.544]``; ``sign="+"`` writes the sign of positive numbers too."""
    mean, low, high = (format(part, f"{sign}.3f") for part in value)
    return f"{mean} [{low}, {high}]"


def comparison_table(base: Result, runs: Sequence[Result]) -> str:
    """One line a metric and policy, grouped by metric; the agents are also compared with the first of them."""
    summary, of_agent = summarise(base, runs), by_agent(runs)
    first = next(iter(of_agent), "")
    headers = [
        "Metric",
        "Policy",
        "Mean [95 % interval]",
        "Difference to base, paired",
        f"Difference to {first}, paired",
    ]
    rows = []
    for metric, title in METRICS.items():
        rows.append([title, "base", with_interval(base["metrics"][metric]), "", ""])
        for agent, of in summary.items():
            difference = bootstrap_interval(pooled(of_agent[agent], metric) - pooled(of_agent[first], metric))
            scores = [with_interval(of[metric]["mean"]), with_interval(of[metric]["difference"], "+")]
            rows.append(["", agent, *scores, "" if agent == first else with_interval(difference, "+")])
    several = len(of_agent) > 1
    return table(headers if several else headers[:-1], rows if several else [row[:-1] for row in rows])


def words_table(base: Result, runs: Sequence[Result], metric: str = "word_accuracy") -> str:
    """One line a policy, a column for the prompts of each number of words."""
    counts = [len(quoted_words(prompt)) for prompt in base["prompts"]["prompt"]]  # N
    columns = {f"Words: {n} (prompts: {counts.count(n)})": np.array(counts) == n for n in sorted({*counts})}
    rows = []
    for policy, of_policy in {"base": [base], **by_agent(runs)}.items():
        scores = pooled(of_policy, metric)
        rows.append([policy, *(with_interval(bootstrap_interval(scores[chosen])) for chosen in columns.values())])
    return table(["Policy", *columns], rows)


def temperature_table(base: Result, runs: Sequence[Result]) -> str:
    """One line a policy, a column for the learned temperature of each grid, the mean over seeds; or nothing."""
    prefix, found = "temperature_", base.get("diagnostics", {})
    names = [name for name in found if name.startswith(prefix)]
    rows = []
    for policy, of_policy in {"base": [base], **by_agent(runs)}.items():
        known = [run["diagnostics"] for run in of_policy if "diagnostics" in run]
        rows.append([policy, *(f"{np.mean([run[name] for run in known]):.3f}" for name in names if known)])
    rows = [row for row in rows if len(row) > 1]
    return table(["Policy", *(name.split("_")[-1] for name in names)], rows) if rows else ""


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


def write_report(
    out: Path, settings: dict[str, Any], base: Result, runs: Sequence[Result], axis: str = "images"
) -> str:
    """Write ``results.json``, ``results.md`` and three pictures, see compare.py; returns the table."""
    headline, temperatures = comparison_table(base, runs), temperature_table(base, runs)
    content = {"settings": settings, "summary": summarise(base, runs), "base": base, "runs": list(runs)}
    write_json(out / "results.json", content)
    text = [
        f"# {out.name}",
        f"{len(base['prompts']['reward'])} held-out prompts, one picture each, the same noise for every policy. "
        "Intervals: 95 %, bootstrap over prompts; an agent's seeds are averaged prompt by prompt.",
        headline,
        "## Word Accuracy by the number of words",
        words_table(base, runs),
    ]
    if temperatures:
        text += [
            "## Learned temperatures",
            "The policy has one learned temperature for each grid, 1 before training. Below 1 it is more certain than "
            "the base policy, which raises the scores by itself; read a gain beside them.",
            temperatures,
        ]
    text += ["## Runs", run_table(runs)] if runs else []
    text += ["## Settings", setting_list(settings)]
    write_text(out / "results.md", "\n\n".join(text) + "\n")
    first = {run["agent"]: run for run in reversed(runs)}  # each agent's first seed
    strips = {"base policy": out / "base" / "samples.png"}
    for agent, run in reversed(first.items()):
        strips[f"{agent}, after {run['budget']['images']} images"] = run_folder(out, agent, run["seed"]) / "samples.png"
    with replacing(out / "before_after.png") as part:
        stack(strips).save(part)
    draw_curves(out / "curves.png", out, runs, [("rollout", axis), ("eval", axis)])
    draw_curves(out / "budgets.png", out, runs, [("eval", budget) for budget in AXES])
    return headline


def setting_list(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in settings.items())


def run_folder(out: Path, agent: str, seed: int | None) -> Path:
    """Where a run keeps its TensorBoard events, ``progress.csv``, policy and result; ``None`` is the base policy's."""
    return out / agent if seed is None else out / agent / f"seed{seed}"


def save_strip(path: Path, evaluation: Evaluation) -> None:
    """The pictures of the first prompts in a row, with what was asked for, what was read, and the score."""
    shown = range(min(SHOWN, len(evaluation.scenes)))
    captions = [caption(evaluation.scenes[i].words, evaluation.words_read[i], evaluation.scores[i]) for i in shown]
    with replacing(path) as part:
        Image.fromarray(sample_sheet(evaluation.images[: len(shown)], captions, len(shown))).save(part)


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
    if len(y) == 0:  # an agent that does not train
        return x, y
    window = max(1, len(y) // 20)
    kernel = np.ones(window) / window
    return np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")


def draw_curves(
    path: Path,
    out: Path,
    runs: Sequence[Result],
    columns: Sequence[tuple[str, str]],
    names: Mapping[str, str] | None = None,
) -> None:
    """Reward and word accuracy, a row each; a colour an agent, a thin line a seed, a thick one their mean.

    Args:
        path: the picture.
        out: where the runs are.
        columns: what to show, one of `SOURCES`, against which of `AXES`.
        names: of the agents in the legend.
    """
    figure, panels = plt.subplots(2, len(columns), figsize=(5.5 * len(columns), 7), sharex="col", squeeze=False)
    agents = by_agent(runs)
    many = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(agents)))  # in order, as values of one setting are
    for row, metric in enumerate(("reward", "word_accuracy")):
        for column, (source, axis) in enumerate(columns):
            panel = panels[row][column]
            x_name = f"eval/{axis}" if source == "eval" else f"budget/{axis}"
            for i, (agent, of_agent) in enumerate(agents.items()):
                curves = []
                for run in of_agent:
                    x, y = read_curve(
                        run_folder(out, agent, run["seed"]) / "progress.csv", x_name, f"{source}/{metric}"
                    )
                    curves.append(running_mean(x, y) if source == "rollout" else (x, y))
                draw_agent(panel, curves, (names or {}).get(agent, agent), f"C{i}" if len(agents) <= 4 else many[i])
            panel.set_title(f"{METRICS[metric]}, {SOURCES[source]}")
            panel.grid(alpha=0.3)
            panels[-1][column].set_xlabel(AXES[axis])
    if agents:
        panels[-1][-1].legend(loc="lower right", fontsize="small")  # where curves that end early leave room
    save_figure(path, figure)


def save_figure(path: Path, figure: Any) -> None:
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def draw_agent(panel: Any, curves: Sequence[tuple[np.ndarray, np.ndarray]], agent: str, colour: Any) -> None:
    """One agent's seeds and their mean, as far as all of them go."""
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return
    for x, y in curves:
        panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
    length = min(len(x) for x, _ in curves)
    x, y = (np.mean([curve[i][:length] for curve in curves], axis=0) for i in (0, 1))
    panel.plot(x, y, color=colour, linewidth=2, label=agent)


def draw_tokens(path: Path, schedules: Mapping[str, ScaleSchedule]) -> None:
    """The tokens of each step, a panel a schedule (the paper's Figure 1)."""
    figure, panels = plt.subplots(1, len(schedules), figsize=(5.5 * len(schedules), 3.5), squeeze=False)
    for panel, (name, schedule) in zip(panels[0], schedules.items(), strict=True):
        steps = range(1, len(schedule) + 1)
        panel.bar(steps, schedule.sizes)
        panel.set_xticks(steps, [f"{h}x{w}" for h, w in schedule.grids], rotation=90)
        panel.set_title(f"{name}: {schedule.total_tokens} tokens in {len(schedule)} steps")
        panel.set_xlabel("grid")
    panels[0][0].set_ylabel("tokens of the step")
    save_figure(path, figure)
