"""The tables of a comparison: means, differences and probabilities with intervals over seeds and prompts, and power.

A *result* is a dict, as it stands in ``result.json``:

- ``agent``; ``seed``, ``None`` for the base policy; ``config``; ``finished``; ``stopped_at``, the images at which a
  clock or a signal ended the run before its budget, else ``None``;
- ``budget``: images, tokens, updates and seconds; ``diagnostics`` of the policy, such as its temperatures;
- ``metrics``: mean and interval of each metric; ``prompts``: lists in the order of the held-out prompts, of the prompt,
  what was read, and every metric; ``beside``: what was measured beside the reward, by `var_env.attributes`;
- ``kl``: mean and interval of the KL to the base policy, nats an image.

Only runs that spent their budget are compared. A run that was stopped is listed, and paired with nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.beside import applicable_shares
from agents.evaluation import Evaluation, bootstrap_interval
from agents.experiments.cells import METRICS, Result
from agents.experiments.output import table
from agents.repair import repaired
from agents.statistics import Components, difference, estimate, iqm, probability_of_improvement
from var_env.faults import ALL_FAMILIES
from var_env.scenes import quoted_words

POWER = 0.8  # of the smallest difference that a comparison could have seen
LOOKED_FOR = 0.05  # a difference in word accuracy that is worth knowing
BESIDE = {  # what the table beside the reward shows, in this order
    "letter_right": "Affected letters right",
    "affected_confused": "confused",
    "affected_other": "other",
    "plain_right": "Other letters right",
    "words_missing": "Words missing",
    "words_extra": "Images with words not asked for",
    "ink_right": "Ink as asked",
    "ground_right": "Ground as asked",
    "contrast": "Contrast",
}


# Numbers -------------------------------------------------------------------------------------------------------------


def measure(evaluation: Evaluation) -> dict[str, Any]:
    """The part of a result that an evaluation gives: ``metrics``, ``prompts``, ``beside`` and, if measured, ``kl``."""
    arrays = (evaluation.scores, evaluation.word_accuracy, evaluation.ned, evaluation.nothing_read)
    scores = {name: [round(float(value), 6) for value in array] for name, array in zip(METRICS, arrays, strict=True)}
    beside = {name: [number(value) for value in values] for name, values in evaluation.beside.items()}
    return {
        "metrics": {name: bootstrap_interval(values) for name, values in scores.items()},
        "prompts": scores | {"prompt": [scene.prompt for scene in evaluation.scenes], "read": evaluation.words_read},
        "beside": beside,
        **({} if evaluation.kl is None else {"kl": bootstrap_interval(evaluation.kl)}),
    }


def number(value: float) -> float | None:
    """As JSON has it: rounded, and ``None`` for what is not applicable."""
    return None if math.isnan(value) else round(float(value), 3)


def complete(runs: Sequence[Result]) -> list[Result]:
    """The runs that spent their budget, which alone are compared."""
    return [run for run in runs if run.get("stopped_at") is None]


def by_agent(runs: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each agent, in the order of their first ones."""
    agents = dict.fromkeys(run["agent"] for run in runs)
    return {agent: [run for run in runs if run["agent"] == agent] for agent in agents}


def scores_of(results: Sequence[Result], metric: str) -> np.ndarray:
    """The scores of S runs on N prompts, ``(S, N)``."""
    return np.array([result["prompts"][metric] for result in results], np.float64)


def strata_of(result: Result) -> list[int]:
    """The number of words that each prompt asks for: resamples of the prompts keep the share of each."""
    return [len(quoted_words(prompt)) for prompt in result["prompts"]["prompt"]]


def summarise(base: Result, runs: Sequence[Result]) -> dict[str, Any]:
    """For each agent and metric: ``mean``, ``difference`` to the base policy, and of later agents ``to_first`` and
    ``better_than_first``, each (value, low, high) with a 95 % interval that resamples seeds and prompts."""
    of_agent, strata = by_agent(complete(runs)), strata_of(base)
    found: dict[str, Any] = {}
    first = next(iter(of_agent), "")
    for agent, of in of_agent.items():
        found[agent] = {}
        for metric in METRICS:
            scores, zero = scores_of(of, metric), scores_of([base], metric)
            entry = {
                "mean": estimate(scores, strata=strata),
                "difference": difference(scores, zero, strata=strata),
            }
            if agent != first:
                other = scores_of(of_agent[first], metric)
                entry["to_first"] = difference(scores, other, strata=strata)
                entry["better_than_first"] = probability_of_improvement(scores, other, strata=strata)
            found[agent][metric] = entry
        found[agent]["iqm"] = estimate(scores_of(of, "reward"), iqm, strata=strata)
        found[agent] |= repaired_by(base, of)
    return found


def repaired_by(base: Result, runs: Sequence[Result]) -> dict[str, Any]:
    """``repaired``, by family (share, low, high), of an agent's runs; nothing where it was not measured."""
    if not runs or not all(run.get("beside") for run in (base, *runs)):
        return {}
    records = [plain([run["beside"] for run in group]) for group in ([base], runs)]
    return {"repaired": repaired(*records, strata=strata_of(base))}


def plain(records: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
    """Records of JSON as arrays, ``None`` as NaN."""
    return [{name: np.array(values, np.float64) for name, values in record.items()} for record in records]


# Tables --------------------------------------------------------------------------------------------------------------


def with_interval(value: Sequence[float], sign: str = "") -> str:
    """``0.512 [0.480, 0.544]``; ``sign="+"`` writes the sign of positive numbers too."""
    mean, low, high = (format(part, f"{sign}.3f") for part in value)
    return f"{mean} [{low}, {high}]"


def comparison_table(base: Result, summary: Mapping[str, Any]) -> str:
    """One line a metric and policy, grouped by metric; the agents are also compared with the first of them."""
    first = next(iter(summary), "")
    headers = ["Metric", "Policy", "Mean [95 % interval]", "Difference to base, paired"]
    headers += [f"Difference to {first}, paired", f"Probability to beat {first}"] if len(summary) > 1 else []
    rows = []
    for metric, title in METRICS.items():
        rows.append([title, "base", with_interval(base["metrics"][metric]), "", "", ""][: len(headers)])
        for agent, of in summary.items():
            entry = of[metric]
            row = ["", agent, with_interval(entry["mean"]), with_interval(entry["difference"], "+")]
            row += [with_interval(entry["to_first"], "+"), chance(entry, metric)] if agent != first else ["", ""]
            rows.append(row[: len(headers)])
    return table(headers, rows)


def chance(entry: Mapping[str, Any], metric: str) -> str:
    """The probability of improvement; of what is better when lower, of being lower."""
    value, low, high = entry["better_than_first"]
    if metric == "nothing_read":
        value, low, high = 1 - value, 1 - high, 1 - low
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def beside_table(base: Result, runs: Sequence[Result]) -> str:
    """One line a policy: what was measured beside the reward, or nothing where it was not."""
    rows = []
    for policy, of_policy in {"base": [base], **by_agent(complete(runs))}.items():
        known = [
            applicable_shares(record) for record in plain([run["beside"] for run in of_policy if run.get("beside")])
        ]
        if known:
            means = [np.mean([of.get(name, math.nan) for of in known]) for name in BESIDE]
            moved = [run["kl"][0] for run in of_policy if "kl" in run]
            kl = f"{np.mean(moved):.1f}" if len(moved) == len(of_policy) else ""
            rows.append([policy, *("" if math.isnan(value) else f"{value:.3f}" for value in means), kl])
    return table(["Policy", *BESIDE.values(), "KL to base, nats an image"], rows) if rows else ""


def repair_table(summary: Mapping[str, Any], header: str = "Agent") -> str:
    """One line an agent, or what ``header`` says: the share of each family of faults repaired; nothing without any."""
    known = {agent: of["repaired"] for agent, of in summary.items() if "repaired" in of}
    families = [family for family in ALL_FAMILIES if any(family in of for of in known.values())]  # of the world
    rows = [
        [agent, *("" if math.isnan(of[family][0]) else with_interval(of[family]) for family in families)]
        for agent, of in known.items()
    ]
    return table([header, *families], rows) if rows else ""


def power_text(base: Result, runs: Sequence[Result]) -> str:
    """What the comparison could have seen, and what it would take to see more, in word accuracy."""
    of_agent, metric = by_agent(complete(runs)), "word_accuracy"
    several = {agent: scores_of(of, metric) for agent, of in of_agent.items() if len(of) > 1}
    if not several:
        return (
            "With one seed an agent, the intervals speak of these runs on other prompts, and not of other runs. How "
            "large a difference the comparison could have seen is known from two seeds on."
        )
    lines = []
    prompts, first = len(base["prompts"]["reward"]), next(iter(several))
    pairs = [(agent, first) for agent in several if agent != first] or [(first, "base")]
    for one, other in pairs:
        parts = Components.of(several[one], scores_of([base], metric) if other == "base" else several[other])
        seeds = min(len(several[one]), len(several.get(other, several[one])))
        needed = parts.seeds_needed(LOOKED_FOR, prompts)
        enough = f"{needed:.0f} seeds" if math.isfinite(needed) else "more prompts, whatever the seeds"
        lines.append(
            f"- {one} against {other}: {seeds} seeds and {prompts} prompts see a difference of "
            f"{parts.detectable(seeds, prompts, POWER):.3f} with a power of {POWER:.0%}; {LOOKED_FOR} takes {enough}."
        )
    return "\n".join(lines)


def words_table(base: Result, runs: Sequence[Result], metric: str = "word_accuracy") -> str:
    """One line a policy, a column for the prompts of each number of words."""
    counts = strata_of(base)  # N
    columns = {f"Words: {n} (prompts: {counts.count(n)})": np.array(counts) == n for n in sorted({*counts})}
    rows = []
    for policy, of_policy in {"base": [base], **by_agent(complete(runs))}.items():
        scores = scores_of(of_policy, metric)  # (S, N)
        cells = [scores[:, chosen] for chosen in columns.values()]
        rows.append([policy, *(with_interval(estimate(x)) if x.shape[1] > 1 else f"{x.mean():.3f}" for x in cells)])
    return table(["Policy", *columns], rows)


def temperature_table(base: Result, runs: Sequence[Result]) -> str:
    """One line a policy, a column for the learned temperature of each grid, the mean over seeds; nothing where all are
    those of the base policy."""
    prefix, found = "temperature_", base.get("diagnostics", {})
    names = [name for name in found if name.startswith(prefix)]
    rows = []
    for policy, of_policy in {"base": [base], **by_agent(complete(runs))}.items():
        known = [run["diagnostics"] for run in of_policy if "diagnostics" in run]
        rows.append([policy, *(f"{np.mean([run[name] for run in known]):.3f}" for name in names if known)])
    rows = [row for row in rows if len(row) > 1]
    moved = any(row[1:] != rows[0][1:] for row in rows)
    return table(["Policy", *(name.split("_")[-1] for name in names)], rows) if moved else ""


def run_table(runs: Sequence[Result]) -> str:
    """One line a run."""
    rows = []
    for run in runs:
        spent, stopped = run["budget"], run.get("stopped_at")
        note = "" if stopped is None else f"stopped at {stopped} images, not compared"
        means = [f"{run['metrics'][metric][0]:.3f}" for metric in METRICS]
        counts = [str(spent["images"]), str(spent["updates"]), f"{spent['seconds']:.0f}"]
        rows.append([run["agent"], str(run["seed"]), *counts, *means, note])
    return table(["Agent", "Seed", "Images", "Updates", "Training s", *METRICS.values(), "Note"], rows)


def setting_list(settings: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in settings.items())
