"""The trials of every agent and the best of them, for `vartext tune`."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from scipy.stats import qmc

from agents import recipes
from agents.experiments import report
from agents.experiments.cells import Cell, Result
from agents.experiments.options import clear_errors
from agents.experiments.output import table, write_json, write_text
from agents.experiments.runs import Comparison
from agents.experiments.tuned import WORLD
from agents.vmr import VMR

LEARNING_RATE = (3e-5, 4e-4)  # log-uniform
KL_COEF = (0.003, 0.3)  # log-uniform
TEMPERATURE = (0.7, 1.0)  # uniform
SUFFIX_SAMPLES = (2, 4)


def trials(recipe: str, count: int, grids: int) -> list[dict[str, Any]]:
    """The settings of each trial of an agent, the same points for all agents.

    Args:
        recipe: of the agent.
        count: of trials; the first ones are the same whatever the count.
        grids: of the schedule, for VMR's split, 1 < m < grids.
    """
    # A Sobol sequence begins at the corner of the cube, which is the edge of every range: the first point is skipped.
    points = qmc.Sobol(5, scramble=False).fast_forward(1).random(count)  # (count, 5) in [0, 1)
    splits = range(2, grids) if grids > 2 else range(1, grids)
    found = []
    for rate, kl, temperature, split, suffixes in points.tolist():
        settings: dict[str, Any] = {
            "learning_rate": float(f"{between(LEARNING_RATE, rate):.2g}"),
            "kl_coef": float(f"{between(KL_COEF, kl):.2g}"),
            "temperature": round(TEMPERATURE[0] + temperature * (TEMPERATURE[1] - TEMPERATURE[0]), 2),
        }
        if any(issubclass(part, VMR) for part in recipes.parts_of(recipe)):
            settings["split"] = splits[int(split * len(splits))]
            settings["suffix_samples"] = SUFFIX_SAMPLES[int(suffixes * len(SUFFIX_SAMPLES))]
        found.append(settings)
    return found


def between(ends: tuple[float, float], share: float) -> float:
    """A point on the way between two positive numbers, on a logarithmic scale."""
    low, high = map(math.log, ends)
    return math.exp(low + share * (high - low))


class Trials(Comparison):
    """A comparison that is judged on validation prompts."""

    judged_on = "val"

    def trial(self, recipe: str, index: int, settings: dict[str, Any], seed: int) -> Cell:
        """One run of an agent with the settings of a trial."""
        return replace(self.cell(recipe, seed, **settings), label=f"{recipe}-{index}")


def run(args: argparse.Namespace) -> int:
    with clear_errors():
        comparison = Trials(args)
        grids = len(comparison.base.schedule)
        plan = {
            comparison.trial(recipe, i, settings, args.seed): (recipe, settings)
            for recipe in args.agents
            for i, settings in enumerate(trials(recipe, args.trials, grids))
        }

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
        page = ["# Trials", about, text, "## Settings", report.setting_list(comparison.described)]
        write_text(args.out / "results.md", "\n\n".join(page) + "\n")
        return f"{text}\n\n{args.out}: tuned.json, results.md"

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
