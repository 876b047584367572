"""Do VMR and PANW help a plain autoregressive model? The same reward and budget on a VAR and on a raster policy.

    python examples/questions/raster.py                           # three seeds, hours on two cores: a raster is slow
    python examples/questions/raster.py --worlds raster --seeds 0 # one process of several, with a seed or world each
    python examples/questions/raster.py --raster-policy runs/raster.safetensors \\
        --raster-tokenizer runs/raster_tokenizer.safetensors      # your own, see examples/pretrain.py

A raster model draws the tokens of one grid one by one, row by row: T = H * W grids of 1 x 1, the degenerate schedule.
Worlds: var, the shipped next-scale policy (or --policy and --tokenizer), and raster. Prompts, reward and budget are the
same; policies, and so what there is to gain, are not, which is why agents are compared within a world.

Arms: grpo and vmr, whose middle step is half of the resolution, or half of the tokens, unless --split is given; and on
the var world vmr+panw. On a raster all k_t of PANW (eq. 9) are equal: it is vmr, exactly. The report shows the
weights; nothing is run for it.

In --out: results.md and gains.png, and for each world a folder with what the other questions have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from question import (
    INTERRUPTED,
    Arm,
    Comparison,
    clear_errors,
    difference,
    draw_intervals,
    parse,
    run,
    table,
    write_json,
    write_results,
    write_text,
)

from agents.experiments.cells import BASE, Result
from agents.experiments.comparable import NOT_COMPARED, read, require_same
from agents.experiments.tables import by_agent, with_interval
from agents.panw import PANW, panw_weights
from agents.recipes import options_of
from var_env import ScaleSchedule

ROOT = Path(__file__).parents[2]
RASTER_POLICY = ROOT / "agents" / "policies" / "assets" / "raster.safetensors"
RASTER_TOKENIZER = ROOT / "var_env" / "assets" / "raster_tokenizer.safetensors"
ARMS = {
    "var": [Arm("grpo", "grpo"), Arm("vmr", "vmr"), Arm("vmr+panw", "vmr+panw")],
    "raster": [Arm("grpo", "grpo"), Arm("vmr", "vmr")],
}
REFERENCE = "grpo"
TITLE = "Do VMR and PANW help a plain autoregressive model?"
ABOUT = """
The same reward, prompts and budget on a next-scale policy and on a raster policy, which draws one grid token by token.
The policies differ, and so does what there is to gain: compare agents within a world.
"""
NO_OP = """\
The weight of a token, as a multiple of the mean over tokens, for the lightest and the heaviest grid. On a raster every
grid is 1 x 1 and all weights are 1: PANW changes nothing there, whatever alpha, and vmr+panw is vmr."""


def of_world(args: argparse.Namespace, world: str) -> argparse.Namespace:
    """The options as they are for one world."""
    own: dict[str, Any] = {"out": args.out / world}
    if world == "raster":
        for path, option in ((args.raster_policy, "policy"), (args.raster_tokenizer, "tokenizer")):
            if not path.is_file():
                raise FileNotFoundError(f"there is no {path}: give --raster-{option}, or leave raster out of --worlds")
        own |= {"policy": args.raster_policy, "tokenizer": args.raster_tokenizer}
    return argparse.Namespace(**vars(args) | own)


def require_same_worlds(out: Path, comparisons: Mapping[str, Comparison]) -> None:
    """``ValueError`` unless the worlds of earlier calls, which the report shows too, are of the same experiment."""
    asked = next(iter(comparisons.values())).asked(BASE)
    for world in ARMS.keys() - comparisons.keys():
        config = read(out / world / BASE.label / "config.json")
        if config is not None:
            require_same(asked, config, out / world, ("base_weights", *NOT_COMPARED))


def panw_range(schedule: ScaleSchedule, alpha: float) -> tuple[float, float]:
    """The lightest and the heaviest weight of a token, as multiples of the mean."""
    weights = panw_weights(schedule, alpha) * schedule.total_tokens
    return weights.min().item(), weights.max().item()


def world_row(
    world: str, arm: str, base: Result, runs: Sequence[Result], reference: Sequence[Result]
) -> dict[str, Any]:
    """What an arm gained in a world, over the base policy and over the reference arm."""
    as_seeds = [{**base, "seed": run["seed"]} for run in runs]
    return {
        "world": world,
        "arm": arm,
        "gain": difference(runs, as_seeds, "reward"),
        "apart": {} if arm == REFERENCE else difference(runs, reference, "reward"),
    }


def write_gains(out: Path, weights: dict[str, Any]) -> str:
    """The worlds side by side, from what has been written for each; returns the tables."""
    found = []
    for world in ARMS:
        path = out / world / "results.json"
        if path.is_file():
            content = json.loads(path.read_text())
            arms = by_agent(content["runs"])
            for arm, runs in arms.items():
                found.append(world_row(world, arm, content["base"], runs, arms.get(REFERENCE, [])))
    rows = []
    for row in found:
        error = row["apart"].get("error")
        apart = with_interval(row["apart"]["interval"], "+") if row["apart"] else ""
        gain = with_interval(row["gain"]["interval"], "+")
        rows.append([row["world"], row["arm"], gain, apart, "" if error is None else f"{error:.3f}"])
    headers = ["World", "Arm", "Reward, less the base's", f"Reward, less {REFERENCE}'s", "s.e. over seeds"]
    gains = table(headers, rows)
    panw = [[world, f"{of['alpha']:g}", f"{of['least']:.3f}", f"{of['most']:.3f}"] for world, of in weights.items()]
    of_panw = table(["World", "alpha", "Lightest", "Heaviest"], panw)
    links = [f"- [{world}]({world}/results.md)" for world in ARMS if (out / world / "results.md").is_file()]
    text = [f"# {TITLE}", ABOUT.strip(), gains, "![Gains](gains.png)", "## PANW's weights", NO_OP, of_panw]
    write_text(out / "results.md", "\n\n".join([*text, "## Worlds", "\n".join(links)]) + "\n")
    write_json(out / "results.json", {"question": TITLE, "gains": found, "panw": weights})
    panel = {f"{row['world']}: {row['arm']}": row["gain"]["interval"] for row in found}
    if panel:
        draw_intervals(out / "gains.png", {"reward gained over the base policy": panel})
    return "\n\n".join([gains, of_panw])


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the worlds")
    worlds = list(ARMS)
    group.add_argument("--worlds", nargs="+", choices=worlds, default=worlds, help=f"(default: {' '.join(worlds)})")
    group.add_argument(
        "--raster-policy", type=Path, metavar="PATH", default=RASTER_POLICY, help="(default: the shipped one)"
    )
    group.add_argument(
        "--raster-tokenizer", type=Path, metavar="PATH", default=RASTER_TOKENIZER, help="(default: the shipped one)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "raster", argv, ["vmr+panw"], add_options)
    with clear_errors():
        comparisons = {world: Comparison(of_world(args, world)) for world in ARMS if world in args.worlds}
        require_same_worlds(args.out, comparisons)
    alpha = args.method.get("alpha", options_of(PANW)["alpha"])
    weights: dict[str, Any] = {}
    for world, comparison in comparisons.items():
        least, most = panw_range(comparison.base.schedule, alpha)
        weights[world] = {"alpha": alpha, "least": least, "most": most}
    status = 0
    for world, comparison in comparisons.items():

        def write(base: Result, runs: list[Result], comparison: Comparison = comparison, world: str = world) -> str:
            title = f"{TITLE} World: {world}"
            written = write_results(comparison, title, ABOUT, REFERENCE, base, runs)
            return f"{world}\n\n{written}\n\n{write_gains(args.out, weights)}"

        status = run(comparison, ARMS[world], args.seeds, write) or status
        if status == INTERRUPTED:
            return status
    return status


if __name__ == "__main__":
    sys.exit(main())
