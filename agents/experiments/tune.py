"""Find settings for each agent with the same number of short trial runs, on validation prompts.

    vartext tune                                            # the four agents of compare, 8 trials each
    vartext tune --agents grpo tree --trials 16 --out runs/tune-two
    vartext tune --ray                                      # many runs at a time
    vartext compare --settings runs/tune/tuned.json         # takes what was found

Every agent gets the same trials: points of one Sobol sequence over the learning rate, the weight of the KL, the
temperature of the sampler in training and the epochs, how often each rollout is learned from, for agents that have
them. VMR takes two more coordinates of the same points, its split m and its K (suffixes that value a prefix). The best
trial by mean reward on the validation prompts gives the agent's settings. No test prompt is looked at.

In --out: tuned.json (the settings of each agent, with every trial), results.md (a table of the trials), report.html
(the same with curves and images, for a browser), results.json, and a folder for each run. A call that was stopped goes
on where it was. To make what was found the default of compare, copy tuned.json into agents/experiments/tuned_settings/.
Of the files there compare takes that of the nearest budget.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.experiments.agent_options import add_plugin_option
from agents.experiments.cells import Cell, Result
from agents.experiments.compare import AGENTS
from agents.experiments.options import Parser, clear_errors, require_at_least_one
from agents.experiments.output import require_folder, table, write_json, write_results
from agents.experiments.run_options import Preset, add_run_options, finish
from agents.experiments.tuned import WORLD

PRESET = Preset(images=2560, test_prompts=192, val_prompts=8, eval_every=1000)  # judged by the end, without curves
LEARNING_RATE = (8e-5, 5e-4)  # log-uniform
KL_COEF = (0.003, 0.05)  # log-uniform
TEMPERATURE = (0.8, 1.0)  # uniform
SUFFIX_SAMPLES = (2, 4)
EPOCHS = (1, 2, 3)


def trials(recipe: str, count: int, grids: int) -> list[dict[str, Any]]:
    """The settings of each trial of an agent, the same points for all agents.

    Args:
        recipe: of the agent.
        count: of trials; the first ones are the same whatever the count.
        grids: of the schedule, for VMR's split, 1 < m < grids.
    """
    from scipy.stats import qmc  # these take a second, and torch with them: --help answers without

    from agents import recipes
    from agents.vmr import VMR

    # A Sobol sequence begins at the corner of the cube, which is the edge of every range: the first point is skipped.
    points = qmc.Sobol(6, scramble=False).fast_forward(1).random(count)  # (count, 6) in [0, 1)
    splits = range(2, grids) if grids > 2 else range(1, grids)
    found = []
    for rate, kl, temperature, split, suffixes, epochs in points.tolist():
        settings: dict[str, Any] = {
            "learning_rate": float(f"{between(LEARNING_RATE, rate):.2g}"),
            "kl_coef": float(f"{between(KL_COEF, kl):.2g}"),
            "temperature": round(TEMPERATURE[0] + temperature * (TEMPERATURE[1] - TEMPERATURE[0]), 2),
        }
        if "epochs" in recipes.options_in(recipe):
            settings["epochs"] = EPOCHS[int(epochs * len(EPOCHS))]
        if any(issubclass(part, VMR) for part in recipes.parts_of(recipe)):
            settings["split"] = splits[int(split * len(splits))]
            settings["suffix_samples"] = SUFFIX_SAMPLES[int(suffixes * len(SUFFIX_SAMPLES))]
        found.append(settings)
    return found


def between(ends: tuple[float, float], share: float) -> float:
    """A point on the way between two positive numbers, on a logarithmic scale."""
    low, high = map(math.log, ends)
    return math.exp(low + share * (high - low))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "vartext tune")
    parser.add_argument("--agents", nargs="+", metavar="AGENT", default=AGENTS, help=f"(default: {' '.join(AGENTS)})")
    add_plugin_option(parser)
    parser.add_argument("--trials", type=int, default=8, help="runs of each agent (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100, help="of all runs; none of compare's (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="(default: %(default)s)")
    add_run_options(parser, {"tune": PRESET})
    args = parser.parse_args(argv)
    with clear_errors():
        require_folder(args.out)
        require_at_least_one(trials=args.trials)
        finish(args, PRESET)
        args.agents = list(dict.fromkeys(args.agents))
    args.seeds = [args.seed]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    from agents.experiments import html_report, tables
    from agents.experiments.runs import Comparison

    with clear_errors():
        comparison = Comparison(args, judged_on="val")
        grids = len(comparison.base.schedule)
        plan: dict[Cell, tuple[str, dict[str, Any]]] = {}
        for recipe in args.agents:
            for i, settings in enumerate(trials(recipe, args.trials, grids)):
                cell = replace(comparison.cell(recipe, args.seed, **settings), label=f"{recipe}-{i}")
                plan[cell] = (recipe, settings)

    def write(base: Result, results: list[Result]) -> str:
        rewards = {result["agent"]: result["metrics"]["reward"][0] for result in results}
        done = [
            {"agent": recipe, "settings": settings, "reward": rewards[cell.label]}
            for cell, (recipe, settings) in plan.items()
            if cell.label in rewards
        ]
        agents = {
            recipe: {**max(own, key=lambda trial: trial["reward"]), "trials": own}
            for recipe in args.agents
            if (own := [trial for trial in done if trial["agent"] == recipe])
        }
        world = {name: comparison.config[name] for name in WORLD}
        budget = {name: comparison.config[name] for name in ("images", "group_size", "prompts_per_update")}
        content = {"world": world, "budget": budget, "base": base["metrics"]["reward"][0], "agents": agents}
        write_json(args.out / "tuned.json", content)
        text = trial_table(agents)
        about = (
            f"Reward on {comparison.settings.test_prompts} validation prompts after {budget['images']} reward calls. "
            f"The base policy has {base['metrics']['reward'][0]:.3f}. The best trial of each agent is marked."
        )
        page = ["# Trials", about, text, "## Settings", tables.setting_list(comparison.described)]
        write_results(args.out, page, settings=comparison.described, trials=agents, base=base, runs=results)
        html_report.write(args.out)
        return f"{text}\n\n{args.out}: report.html, tuned.json, results.md, results.json"

    return comparison.run(list(plan), write)


def trial_table(agents: dict[str, dict[str, Any]]) -> str:
    """One line a trial."""
    names = list(dict.fromkeys(name for entry in agents.values() for name in entry["settings"]))
    rows = []
    for recipe, entry in agents.items():
        for trial in entry["trials"]:
            best = "best" if trial["settings"] == entry["settings"] else ""
            values = [str(trial["settings"].get(name, "")) for name in names]
            rows.append([recipe, *values, f"{trial['reward']:.3f}", best])
    return table(["Agent", *names, "Reward", ""], rows)
