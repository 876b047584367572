"""What a results folder tells, read for report.html and checked: one clear line for whatever is wrong with it."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agents.experiments import figures
from agents.experiments.cells import AXES, METRICS, Result
from agents.experiments.output import FORMAT
from var_env.faults import ALL_FAMILIES

AGAIN = "the command that made it, with the same --out, writes what is missing"
OF_RUN = ("agent", "seed", "metrics", "prompts")
CURVES = {  # the columns of progress.csv by what they are of: the axes, then what is drawn against them
    "eval": ({axis: f"eval/{axis}" for axis in AXES}, {name: f"eval/{name}" for name in METRICS}),
    "rollout": (
        {axis: f"budget/{axis}" for axis in AXES},
        {name: f"rollout/{name}" for name in ("reward", "word_accuracy")},
    ),
    "repair": ({axis: f"eval/{axis}" for axis in AXES}, {family: f"repair/{family}" for family in ALL_FAMILIES}),
}
POINTS = 300  # at most, of a curve
Curve = dict[str, list[float]]  # each axis, and "y"


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a folder, with the text of results.md as ``text``.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
        ValueError: it is half written, damaged, or of another version.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}: give the --out of vartext compare, ablate, tune or a question")
    path = folder / "results.json"
    if not path.is_file():
        if any(folder.glob("*/config.json")) or any(folder.glob("*/seed*/config.json")):
            raise ValueError(f"{folder} is half written, it has runs and no results.json: {AGAIN}")
        raise FileNotFoundError(
            f"{folder} has no results.json: give the --out of vartext compare, ablate, tune or a question"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("this is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): {AGAIN}") from None
    if (version := content.get("format", FORMAT)) != FORMAT:
        raise ValueError(f"{path} has format {version}, and this version reads {FORMAT}: use the version that wrote it")
    kinds = {"settings": dict, "base": dict, "runs": list}
    missing = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    runs = [] if missing else [content["base"], *content["runs"]]
    missing += [f"{name} of a run" for run in runs for name in OF_RUN if not isinstance(run, dict) or name not in run]
    if missing:
        raise ValueError(f"{path} has no {missing[0]}, so another version wrote it: use that one")
    text = folder / "results.md"
    if not text.is_file():
        raise ValueError(f"{folder} is half written, it has no results.md: {AGAIN}")
    return content | {"text": text.read_text()}


def curves_of(out: Path, run: Result) -> dict[str, dict[str, Curve]]:
    """A run's curves by source and by what is drawn, see `CURVES`; a source without a point is left out.

    Raises:
        ValueError: progress.csv is damaged.
    """
    path = figures.run_folder(out, run["agent"], run["seed"]) / "progress.csv"
    if not path.is_file():
        return {}
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = {}
        for source, (axes, columns) in CURVES.items():
            curves = {name: curve(rows, axes, column, source == "rollout") for name, column in columns.items()}
            found[source] = {name: of for name, of in curves.items() if of["y"]}
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {AGAIN}, once the run's folder is deleted") from None
    return {source: of for source, of in found.items() if of}


def curve(rows: Sequence[dict[str, str]], axes: dict[str, str], column: str, smooth: bool) -> Curve:
    """One column against all axes, in the rows that have it; smoothed as curves.png is, and thinned."""
    whole = [row for row in rows if all(row.get(name) for name in (*axes.values(), column))]
    values = {axis: np.array([row[name] for row in whole], np.float64) for axis, name in axes.items()}
    y = np.array([row[column] for row in whole], np.float64)
    if smooth:
        values = {axis: figures.running_mean(x, y)[0] for axis, x in values.items()}
        y = figures.running_mean(y, y)[1]
    kept = np.unique(np.linspace(0, len(y) - 1, min(POINTS, len(y))).round().astype(int))
    return {name: [float(f"{value:.6g}") for value in of[kept]] for name, of in (values | {"y": y}).items()}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, as far as all of them go; axes and values alike."""
    length = min(len(curve["y"]) for curve in curves)
    return {name: np.mean([curve[name][:length] for curve in curves], axis=0).tolist() for name in curves[0]}


def gallery_of(out: Path, run: Result) -> dict[str, Any] | None:
    """A run's ``gallery.json`` with its images as data URIs, one a prompt, its frames side by side; or ``None``.

    Raises:
        ValueError: the files are damaged, or do not belong together.
    """
    folder = figures.run_folder(out, run["agent"], run["seed"])
    path = folder / "gallery.json"
    if not (path.is_file() and path.with_suffix(".png").is_file()):
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        sheet = Image.open(path.with_suffix(".png")).convert("RGB")
        prompts, frames = content["prompts"], content["frames"]
        height = sheet.height // len(prompts)
        if sheet.size != (height * len(frames), height * len(prompts)):
            raise ValueError(
                f"{sheet.width} x {sheet.height} pixels are not {len(prompts)} rows of {len(frames)} images"
            )
        for row, entry in enumerate(prompts):
            strip = sheet.crop((0, row * height, sheet.width, (row + 1) * height))
            entry["image"] = data_uri(strip)
    except (KeyError, OSError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} or its .png cannot be read ({error}): {AGAIN}, once {folder} is deleted") from None
    return content


def data_uri(image: Image.Image) -> str:
    """An image as text that a page can hold, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
