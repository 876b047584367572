"""The figures of a comparison: learning curves, repair of faults, profile of scores, images before and after."""

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
from agents.evaluation import Evaluation
from agents.experiments.cells import AXES, METRICS, Result
from agents.experiments.tables import by_agent, complete, scores_of
from agents.statistics import performance_profile
from var_env import ScaleSchedule
from var_env.faults import ALL_FAMILIES, FAMILIES

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no window

SOURCES = {"rollout": "training samples", "eval": "held-out prompts"}
SHOWN = 8  # prompts in a strip of images, the first ones
LABEL = 22  # px, the height of a strip's title


def run_folder(out: Path, agent: str, seed: int | None) -> Path:
    """Where a run keeps its TensorBoard events, ``progress.csv``, policy and result; ``None`` is the base policy's."""
    return out / agent if seed is None else out / agent / f"seed{seed}"


def save_strip(path: Path, evaluation: Evaluation) -> None:
    """The images of the first prompts in a row, with what was asked for, what was read, and the score."""
    shown = range(min(SHOWN, len(evaluation.scenes)))
    captions = [caption(evaluation.scenes[i].words, evaluation.words_read[i], evaluation.scores[i]) for i in shown]
    with replacing(path) as part:
        Image.fromarray(sample_sheet(evaluation.images[: len(shown)], captions, len(shown))).save(part)


def stack(strips: dict[str, Path]) -> Image.Image:
    """Images one below the other, each under its title."""
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
        path: the image.
        out: where the runs are.
        columns: what to show, one of `SOURCES`, against which of `AXES`.
        names: of the agents in the legend.
    """
    figure, panels = plt.subplots(2, len(columns), figsize=(5.5 * len(columns), 7), sharex="col", squeeze=False)
    agents = by_agent(runs)
    colours = agent_colours(len(agents))
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
                stopped = [run.get("stopped_at") for run in of_agent]
                draw_agent(panel, curves, (names or {}).get(agent, agent), colours[i], stopped)
            panel.set_title(f"{METRICS[metric]}, {SOURCES[source]}")
            panel.grid(alpha=0.3)
            panels[-1][column].set_xlabel(AXES[axis])
    if agents:
        panels[-1][-1].legend(loc="lower right", fontsize="small")  # where curves that end early leave room
    save_figure(path, figure)


def draw_frontier(path: Path, out: Path, runs: Sequence[Result]) -> None:
    """Reward and word accuracy on the curves' prompts against the KL to the base policy: what each nat buys."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharex=True)
    agents = by_agent(complete(runs))
    colours = agent_colours(len(agents))
    for panel, metric in zip(panels, ("reward", "word_accuracy"), strict=True):
        for i, (agent, of_agent) in enumerate(agents.items()):
            curves = [
                read_curve(run_folder(out, agent, run["seed"]) / "progress.csv", "eval/kl", f"eval/{metric}")
                for run in of_agent
            ]
            draw_agent(panel, curves, agent, colours[i])
        panel.set(title=f"{METRICS[metric]}, held-out prompts", xlabel="KL to the base policy, nats an image")
        panel.grid(alpha=0.3)
    if agents:
        panels[-1].legend(loc="lower right", fontsize="small")
    save_figure(path, figure)


def agent_colours(count: int) -> list[Any]:
    """A colour an agent: of a few, ones that are told apart; of many, a sequence, as values of one setting are."""
    return [f"C{i}" for i in range(count)] if count <= 4 else list(plt.get_cmap("viridis")(np.linspace(0, 0.9, count)))


def save_figure(path: Path, figure: Any) -> None:
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def draw_agent(
    panel: Any,
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    agent: str,
    colour: Any,
    stopped: Sequence[int | None] = (),
) -> None:
    """One agent's seeds and their mean, as far as all of them go; runs that were stopped stand apart, dashed."""
    ends = list(stopped) or [None] * len(curves)
    for (x, y), end in zip(curves, ends, strict=True):
        if end is not None and len(x):
            panel.plot(x, y, "--", color=colour, linewidth=1.2, label=f"{agent}, stopped at {end}")
    whole = [curve for curve, end in zip(curves, ends, strict=True) if end is None and len(curve[0])]
    if not whole:
        return
    for x, y in whole:
        panel.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
    length = min(len(x) for x, _ in whole)
    x, y = (np.mean([curve[i][:length] for curve in whole], axis=0) for i in (0, 1))
    panel.plot(x, y, color=colour, linewidth=2, label=agent)


def draw_repair(path: Path, out: Path, runs: Sequence[Result]) -> None:
    """The share of each family of faults repaired on the curves' prompts, against images; a panel a family.

    Repaired is 1 - (rate of faults now) / (rate before training), as in `agents.repair`.
    """
    agents = by_agent(runs)

    def curve(family: str, agent: str, run: Result) -> tuple[np.ndarray, np.ndarray]:
        path = run_folder(out, agent, run["seed"]) / "progress.csv"
        return read_curve(path, "eval/images", f"repair/{family}")

    known = [f for f in ALL_FAMILIES if any(len(curve(f, agent, run)[0]) for agent, of in agents.items() for run in of)]
    families = known or FAMILIES
    figure, panels = plt.subplots(1, len(families), figsize=(5 * len(families), 4), sharex=True, squeeze=False)
    colours = agent_colours(len(agents))
    for panel, family in zip(panels[0], families, strict=True):
        for i, (agent, of_agent) in enumerate(agents.items()):
            found = [curve(family, agent, run) for run in of_agent]
            stopped = [run.get("stopped_at") for run in of_agent]
            draw_agent(panel, found, agent, colours[i], stopped)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=f"{family}: share repaired", xlabel=AXES["images"], ylim=(-0.6, 1.05))
        panel.grid(alpha=0.3)
    if agents:
        panels[0][0].legend(loc="upper left", fontsize="small")
    save_figure(path, figure)


def draw_profile(path: Path, base: Result, runs: Sequence[Result], metric: str = "reward") -> None:
    """The share of runs and prompts with a score above each threshold, with its 95 % band (arXiv 2108.13264)."""
    figure, panel = plt.subplots(figsize=(6.5, 4.5))
    policies = {"base": [base], **by_agent(complete(runs))}
    every = np.concatenate([scores_of(of, metric).ravel() for of in policies.values()])
    thresholds = np.linspace(every.min(), every.max(), 25)
    colours = ["grey", *agent_colours(len(policies) - 1)]
    for i, (policy, of) in enumerate(policies.items()):
        share, low, high = performance_profile(scores_of(of, metric), thresholds.tolist(), n=300)
        panel.plot(thresholds, share, color=colours[i], label=policy)
        panel.fill_between(thresholds, low, high, color=colours[i], alpha=0.2, linewidth=0)
    panel.set(xlabel=f"{METRICS[metric]}, threshold", ylabel="share of prompts above it")
    panel.legend()
    panel.grid(alpha=0.3)
    save_figure(path, figure)


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
