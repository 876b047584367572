"""Why do more than two suffixes a prefix hurt with Mask Propagation? Masks and gradients, then short trainings.

    python examples/questions/suffix_samples.py                         # about two hours on two cores
    python examples/questions/suffix_samples.py --stop-after measuring  # what the base policy's gradients say, alone
    python examples/questions/suffix_samples.py --preset full --seeds 0 # hours: one process of several, a seed each

The paper finds that K = 4 suffixes are worse than 2 (Table 5) and suspects the mask, and variance. So K = 1, 2, 4 meets
no mask and MP's three ways to combine the masks of a prefix's K images (--suffix-masks: union, intersection, mean).

Measured on prefix updates of the base policy, nothing learned, --batch-images reward calls for each K, so that a larger
K has fewer prefixes; --batches batches a seed; the same batches for all masks:

- the mask's size at each scale, and the share of prefixes that have an image in which nothing was read, whose union is
  everything;
- the variance of the prefixes' values within a prompt, and the share of it that is the prefix's own and not its
  suffixes' noise;
- the gradient's overlap: the cosine between two halves of a batch (reliability), for each scale and for all, and
  between scales (agents/conflict.py);
- signal and noise: squared lengths of the true gradient and of the noise, both estimated from the halves, and their
  ratio, at equal reward calls. The advantages are divided by their group's deviation, so only ratios compare over K.

Trained: vmr+panw+mp with every K and mask, and vmr+panw without one, at equal reward calls.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from question import Arm, Comparison, clear_errors, parse, plt, run, table, write_json, write_results, write_text
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from agents import Agent, Decoding, MaskPropagation, Wrapper, recipes
from agents.conflict import cosines, half_gradients, reliability
from agents.experiments.cells import Result
from agents.experiments.comparable import read, require_same
from agents.experiments.figures import save_figure
from agents.experiments.tuned import WORLD
from agents.mask_propagation import COMBINATIONS
from agents.rollout import Rollout
from agents.split_rule import variance_components

SAMPLES = (1, 2, 4)
MASKS = ("none", *COMBINATIONS)
REFERENCE = "k2-union"
BATCHES = {"quick": 4, "full": 32}
TITLE = "Why do more than two suffixes a prefix hurt with Mask Propagation?"
ABOUT = """
The paper finds K = 4 suffixes worse than 2 and suspects the mask's compatibility, and variance (section 4.4). Here K
meets no mask, and MP's three ways to combine the masks of a prefix's K images.
"""
MEASURED = """\
Prefix updates of the base policy, m = {m}, {images} reward calls a batch whatever K, {batches} batches; the same
batches for all masks. Means, and standard errors over the batches. *Decided*: the share of the values' variance within
a prompt that is the prefix's own and not the noise of its K suffixes; for K = 1 from the components that K = 2 shows.
*Reliability*: the cosine between the gradients of two halves of a batch, all scales of the prefix together. *Signal to
noise*: squared lengths of the true gradient and of a batch's noise, ratio of the means over batches; below 0 when the
halves disagree, as they may by chance."""

Measurement = dict[str, Any]  # of one batch: K, value_variance, between, within, unread, masks by name


def arms() -> list[Arm]:
    """With one image a row, all ways to combine are the same."""
    found = []
    for k in SAMPLES:
        found.append(Arm(f"k{k}-none", "vmr+panw", {"suffix_samples": k}))
        masks = COMBINATIONS if k > 1 else COMBINATIONS[:1]
        found += [Arm(f"k{k}-{mask}", "vmr+panw+mp", {"suffix_samples": k, "suffix_masks": mask}) for mask in masks]
    return found


# Measuring -----------------------------------------------------------------------------------------------------------


def prefix_agent(comparison: Comparison, args: argparse.Namespace, mask: str, k: int, seed: int) -> Agent | Wrapper:
    """VMR on the base policy itself, since nothing is learned; without PANW, which has nothing to do with K."""
    settings = comparison.settings
    recipe, own = ("vmr", {}) if mask == "none" else ("vmr+mp", {"suffix_masks": mask})
    known = recipes.options_in(recipe)
    method = {name: value for name, value in comparison.method.items() if name in known and name not in own}
    agent = recipes.make(
        recipe,
        comparison.env,
        comparison.base,
        **method
        | own
        | {
            "suffix_samples": k,
            "group_size": settings.group_size,
            "prompts_per_update": args.batch_images // (settings.group_size * k),
            "kl_coef": 0.0,
            "micro_batch": 64,
            "image_interval": 0,
            "decoding": Decoding(temperature=settings.temperature),
            "seed": seed,
            "device": comparison.base.device,
        },
    )
    agent.unwrapped.set_logger(Logger(None, []))
    return agent


def measure(comparison: Comparison, args: argparse.Namespace, k: int, seed: int) -> list[Measurement]:
    """The batches of one K and seed."""
    agents = {mask: prefix_agent(comparison, args, mask, k, seed) for mask in MASKS}
    found = []
    for _ in range(args.batches):
        rollout = agents["none"].unwrapped.sample()
        batch = of_rollout(rollout) | {"suffix_samples": k, "masks": {}}
        for mask, agent in agents.items():
            batch["masks"][mask] = of_mask(agent, rollout)
        found.append(batch)
    return found


def of_rollout(rollout: Rollout) -> Measurement:
    """What no mask changes: the values of the prefixes, and what could be read."""
    unread = np.array([len(words) == 0 for words in rollout.words_read]).reshape(-1, rollout.suffixes)
    returns = rollout.returns.double()
    between, within = variance_components(returns) if rollout.suffixes > 1 else (None, None)
    return {
        "value_variance": rollout.scores.double().var(1).mean().item(),
        "between": between,
        "within": within,
        "unread": float(unread.any(1).mean()),
    }


def of_mask(agent: Agent | Wrapper, rollout: Rollout) -> dict[str, Any]:
    """The gradients of one batch under one mask, and how much of each scale the mask keeps."""
    core, steps = agent.unwrapped, range(len(rollout.grids))
    first, second, _ = half_gradients(agent, rollout, steps)  # type: ignore[arg-type]
    whole = [part.sum(0) for part in (first, second)]  # of all scales together
    pairs = cosines(first + second)[~torch.eye(len(first), dtype=torch.bool, device=first.device)]
    masks = agent.masks(rollout) if isinstance(agent, MaskPropagation) else []
    kept = [masks[t].float().mean().item() for t in steps] if masks else [1.0] * len(steps)
    return {
        "scales": [name for name, band in core.policy.schedule.bands if band.start < steps.stop],
        "kept": kept,
        "reliability": reliability(*whole).item(),
        "reliability_of_scales": reliability(first, second).tolist(),
        "cosine_between_scales": pairs.nanmean().item() if len(pairs) else math.nan,
        "signal": 4 * (whole[0] @ whole[1]).item(),  # the halves' noise is independent, and each has half the gradient
        "noise": (whole[0] - whole[1]).square().sum().item(),
    }


def measured(comparison: Comparison, args: argparse.Namespace, seeds: Sequence[int]) -> list[Measurement]:
    """All batches, measured or read from the files of an earlier call or another process."""
    config = {
        **{name: comparison.config[name] for name in (*WORLD, "group_size", "temperature")},
        **{name: value for name, value in comparison.method.items() if name not in ("suffix_samples", "suffix_masks")},
        "pictures": args.batch_images,
        "batches": args.batches,
    }
    found = []
    for seed in seeds:
        for k in SAMPLES:
            path = comparison.out / "measured" / f"k{k}-seed{seed}.json"
            content = read(path, "config", "batches")
            if content is not None:
                require_same(config, content["config"], path)
            else:
                tqdm.write(f"measuring K = {k}, seed {seed}", file=sys.stderr)
                content = {"config": config, "batches": measure(comparison, args, k, seed)}
                write_json(path, content)
            found += content["batches"]
    return found


# Reporting -----------------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """NaN for an error of a single value."""
    array = np.array(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else math.nan


def decided(batches: Sequence[Measurement], k: int) -> float:
    """The share of the values' variance that the prefixes decide, ``b / (b + w / K)``."""
    source = [batch for batch in batches if batch["suffix_samples"] == max(k, 2)]
    between, within = (max(float(np.mean([batch[name] for batch in source])), 0.0) for name in ("between", "within"))
    return between / (between + within / k) if between + within else math.nan


def summarise(batches: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A line for each K and mask."""
    lines = []
    for k in SAMPLES:
        of_k = [batch for batch in batches if batch["suffix_samples"] == k]
        for mask in MASKS:
            parts = [batch["masks"][mask] for batch in of_k]
            signal, error = mean_and_error([part["signal"] for part in parts])
            noise = float(np.mean([part["noise"] for part in parts]))
            lines.append(
                {
                    "suffix_samples": k,
                    "mask": mask,
                    "scales": parts[0]["scales"],
                    "kept": np.mean([part["kept"] for part in parts], 0).tolist(),
                    "reliability_of_scales": np.mean([part["reliability_of_scales"] for part in parts], 0).tolist(),
                    "reliability": mean_and_error([part["reliability"] for part in parts]),
                    "cosine_between_scales": mean_and_error([part["cosine_between_scales"] for part in parts]),
                    "signal_to_noise": (signal / noise, error / noise) if noise else (math.nan, math.nan),
                    "unread": float(np.mean([batch["unread"] for batch in of_k])),
                    "value_variance": mean_and_error([batch["value_variance"] for batch in of_k]),
                    "decided": decided(batches, k),
                }
            )
    return lines


def measured_table(lines: Sequence[dict[str, Any]]) -> str:
    def with_error(value: tuple[float, float], digits: int = 3) -> str:
        return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"

    rows = [
        [
            str(line["suffix_samples"]),
            line["mask"],
            " ".join(f"{kept:.2f}" for kept in line["kept"]),
            f"{line['unread']:.1%}",
            with_error(line["value_variance"]),
            f"{line['decided']:.1%}",
            with_error(line["reliability"]),
            with_error(line["cosine_between_scales"]),
            with_error(line["signal_to_noise"], 4),
        ]
        for line in lines
    ]
    kept = f"Mask kept at {', '.join(lines[0]['scales'])}"
    headers = ["K", "Mask", kept, "Prefixes with an unread image", "Variance of values", "Decided"]
    return table([*headers, "Reliability", "Cosine between scales", "Signal to noise"], rows)


def draw_measured(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Mask size, reliability and signal to noise against K, a line a mask."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.5))
    for i, mask in enumerate(MASKS):
        mine = [line for line in lines if line["mask"] == mask]
        k = [line["suffix_samples"] for line in mine]
        panels[0].plot(k, [line["kept"][-1] for line in mine], "o-", color=f"C{i}", label=mask)
        for panel, name in zip(panels[1:], ("reliability", "signal_to_noise"), strict=True):
            means, errors = zip(*(line[name] for line in mine), strict=True)
            panel.errorbar(k, means, np.nan_to_num(errors), marker="o", color=f"C{i}", capsize=3)
    titles = (f"share of {lines[0]['scales'][-1]} kept", "reliability", "signal to noise")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("K")
        panel.set_xticks(SAMPLES)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    save_figure(path, figure)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--batch-images", "--pictures", type=int, default=512, help="reward calls of a batch (default: %(default)s)"
    )
    counts = ", ".join(f"{count} in {preset}" for preset, count in BATCHES.items())
    group.add_argument("--batches", type=int, help=f"for each K and seed (default: {counts})")
    group.add_argument("--stop-after", choices=["measuring"], help="train nothing")


def check(args: argparse.Namespace) -> None:
    """Set what depends on the preset. ``ValueError`` for options that make no sense here."""
    args.batches = BATCHES[args.preset] if args.batches is None else args.batches
    prompt = max(SAMPLES) * args.settings.group_size  # images of one prompt for the largest K
    if args.batch_images < 2 * prompt or args.batch_images % prompt:
        raise ValueError(
            f"--batch-images must be a multiple of {prompt}, at least {2 * prompt}, got {args.batch_images}"
        )
    if args.batches < 1:
        raise ValueError(f"--batches must be at least 1, got {args.batches}")
    for name in ("suffix_samples", "suffix_masks"):
        if name in args.method:
            raise ValueError(f"--{name.replace('_', '-')} is what is compared here: leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, "suffix-samples", argv, ["vmr+panw+mp"], add_options)
    with clear_errors():
        check(args)
        comparison = Comparison(args)
        batches = measured(comparison, args, args.seeds)
    lines = summarise(batches)
    m = len(lines[0]["scales"])
    about = MEASURED.format(m=m, images=args.batch_images, batches=args.batches * len(args.seeds))
    draw_measured(args.out / "measured.png", lines)
    write_json(args.out / "measured.json", lines)
    sections = ["## Measured", about, measured_table(lines), "![Measured](measured.png)"]
    write_text(args.out / "measured.md", "\n\n".join([f"# {TITLE}", *sections]) + "\n")
    if args.stop_after:
        print(sections[2])
        return 0

    def write(base: Result, runs: list[Result]) -> str:
        return write_results(comparison, TITLE, ABOUT, REFERENCE, base, runs, sections, measured=lines)

    return run(comparison, arms(), args.seeds, write)


if __name__ == "__main__":
    sys.exit(main())
