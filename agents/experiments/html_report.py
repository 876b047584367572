"""report.html: a comparison to look at, one file that opens without a network.

It shows what is in the folder: the tables of results.md, every run's progress.csv as curves, and what `gallery` kept of
its images. The page's parts are in page/: a Jinja template, its style, and the script that draws with plotly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markdown
import numpy as np
from matplotlib import colormaps, colors
from PIL import Image

from agents.experiments import stored_results, tables
from agents.experiments.cells import AXES, METRICS, Result
from agents.experiments.output import write_text
from agents.statistics import estimate
from var_env.faults import ALL_FAMILIES

HERE = Path(__file__).parent / "page"
# Okabe and Ito's colours, without those that vanish on white or on black; the blue is lighter.
COLOURS = ("#1A7FC4", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#808080"  # the base policy's
IMAGES = 3_500_000  # characters, at most, of all images: the page with plotly stays well below 10 MB
INTERVALS = ("reward", "word_accuracy", "ned", "nothing_read")
FIGURES = ("before_after.png", "curves.png", "budgets.png", "repair.png", "frontier.png")
DRAWN = FIGURES[:4]  # by the script, from the runs' own files where these are there
FOLDED = ("Settings", "Runs")  # sections that are closed at first


def write(folder: Path) -> Path:
    """Write ``report.html`` into a results folder; returns its path.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
        ValueError: what is in it is half written, damaged, or of another version.
    """
    path = folder / "report.html"
    write_text(path, page(folder))
    return path


def page(folder: Path) -> str:
    """The HTML of a results folder; raises as `write` does."""
    from plotly.offline import get_plotlyjs  # it takes a while, and only the page needs it

    content = stored_results.read_results(folder)
    base, runs = content["base"], content["runs"]
    data = {
        "agents": agents_of(folder, base, runs),
        "axes": AXES,
        "metrics": METRICS,
        "families": list(ALL_FAMILIES),
        "intervals": intervals(content),
        "repaired": repaired(content),
        "groups": content.get("tables", {}),
    }
    shown, frames, cut = gallery(folder, base, runs)
    has_curves = any(agent["seeds"] for agent in data["agents"])
    lead, sections = split_text(content["text"])
    drawn = {name for name in DRAWN if (shown if name == "before_after.png" else has_curves)}
    images = [name for name in FIGURES if name not in drawn and (folder / name).is_file()]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {}  # in the order that the data have
    return environment.get_template("report.html").render(
        title=lead.splitlines()[0].lstrip("# "),
        lead=to_html("\n".join(lead.splitlines()[1:]), folder),
        sections=[(title, to_html(body, folder), title not in FOLDED) for title, body in sections],
        data=data,
        has_curves=has_curves,
        has_repair=any("repair" in agent["mean"] for agent in data["agents"]) or bool(data["repaired"]),
        prompts=shown,
        frames=frames,
        cut=cut,
        figures=[(name, stored_results.data_uri(Image.open(folder / name).convert("RGB"))) for name in images],
        plotly=get_plotlyjs(),
        style=(HERE / "report.css").read_text(),
        script=(HERE / "report.js").read_text(),
    )


# What the script draws -----------------------------------------------------------------------------------------------


def agents_of(folder: Path, base: Result, runs: Sequence[Result]) -> list[dict[str, Any]]:
    """The base policy and the agents: name, colour, and the curves of their seeds with the mean of whole runs."""
    found: list[dict[str, Any]] = [{"name": "base", "colour": GREY, "seeds": [], "mean": {}}]
    agents = tables.by_agent(runs)
    for colour, (agent, of) in zip(palette(len(agents)), agents.items(), strict=True):
        seeds = [
            {"seed": run["seed"], "stopped": run.get("stopped_at"), "curves": curves}
            for run in of
            if (curves := stored_results.curves_of(folder, run))
        ]
        whole = [entry["curves"] for entry in seeds if entry["stopped"] is None]
        mean: dict[str, dict[str, Any]] = {}
        for source in stored_results.CURVES:
            names = [set(curves.get(source, {})) for curves in whole]
            for name in sorted(set.intersection(*names)) if names else []:
                mean.setdefault(source, {})[name] = stored_results.mean_curve(
                    [curves[source][name] for curves in whole]
                )
        found.append({"name": agent, "colour": colour, "seeds": seeds, "mean": mean})
    return found


def palette(count: int) -> list[str]:
    """Colours that colour-blind readers tell apart; of many agents a sequence, as values of one setting are."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colors.to_hex(colour) for colour in colormaps["viridis"](np.linspace(0.15, 0.9, count))]


def intervals(content: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """For each metric and policy the mean with the ends of its 95 % interval; of runs that spent their budget."""
    base, known = content["base"], content.get("summary") or content.get("arms") or {}
    found: dict[str, dict[str, list[float]]] = {}
    for metric in INTERVALS:
        if metric not in base["metrics"]:
            continue
        found[metric] = {"base": list(base["metrics"][metric])}
        for agent, of in tables.by_agent(tables.complete(content["runs"])).items():
            value = known.get(agent, {}).get(metric, {}).get("mean")
            if value is None:
                value = estimate(tables.scores_of(of, metric), strata=tables.strata_of(base))
            found[metric][agent] = [float(part) for part in value]
    return found


def repaired(content: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """For each family of faults and agent the share repaired, with its interval, where the results tell it."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for family in ALL_FAMILIES:
        for agent, of in content.get("summary", {}).items():
            value = of.get("repaired", {}).get(family)
            if value is not None and not math.isnan(value[0]):
                ends = [None if math.isnan(part) else float(part) for part in value]
                found.setdefault(family, {})[agent] = ends
    return found


# The gallery ---------------------------------------------------------------------------------------------------------


def gallery(folder: Path, base: Result, runs: Sequence[Result]) -> tuple[list[dict[str, Any]], list[str], str]:
    """The same prompts for all policies: a list of prompts with their tiles; the frames' names; what was left out.

    An agent is shown by its first run that kept images.
    """
    kept: dict[str, dict[str, Any]] = {}
    left_out = []
    for agent, of in tables.by_agent([base, *runs]).items():
        found = next((images for run in of if (images := stored_results.gallery_of(folder, run))), None)
        if found is None:
            left_out.append(agent)
        else:
            kept[agent] = found
    if not kept:
        return [], [], ""
    asked = [entry["prompt"] for entry in next(iter(kept.values()))["prompts"]]
    for agent in [agent for agent, of in kept.items() if [entry["prompt"] for entry in of["prompts"]] != asked]:
        del kept[agent]
        left_out.append(agent)
    prompts: list[dict[str, Any]] = []
    size = 0
    for i, prompt in enumerate(asked):
        tiles = [{"agent": agent, "frames": of["frames"], **of["prompts"][i]} for agent, of in kept.items()]
        size += sum(len(tile["image"]) for tile in tiles)
        if prompts and size > IMAGES:
            break
        prompts.append({"prompt": prompt, "tiles": tiles})
    notes = [f"No images of {', '.join(left_out)}: an earlier version made these runs."] if left_out else []
    notes += [f"{len(prompts)} of {len(asked)} prompts, as more would not fit."] if len(prompts) < len(asked) else []
    longest = max((of["frames"] for of in kept.values()), key=len)
    return prompts, longest, " ".join(notes)


# The text ------------------------------------------------------------------------------------------------------------


def split_text(text: str) -> tuple[str, list[tuple[str, str]]]:
    """results.md as what comes first, up to a table at least, and the other sections, each a title and its body."""
    lead, *rest = text.split("\n## ")
    while rest and not any("\n|" in part for part in [lead]) and any("\n|" in part for part in rest):
        lead += "\n## " + rest.pop(0)
    return lead, [(part.partition("\n")[0], part.partition("\n")[2]) for part in rest]


def to_html(text: str, folder: Path) -> str:
    """Markdown as HTML; raw HTML in it stays text, images of the folder that the page draws itself are left out."""
    reader = markdown.Markdown(extensions=["tables", "sane_lists"])
    reader.preprocessors.deregister("html_block")
    reader.inlinePatterns.deregister("html")
    lines = [line for line in text.split("\n") if not line.startswith("![")]
    html: str = reader.convert("\n".join(lines))
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
