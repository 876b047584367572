"""At which grid each family of planted faults is decided, for ``vartext sweep --fault-share``.

For a split m every prompt gets 4 prefixes of m grids and every prefix 4 suffixes. Of each thing that can go wrong, a
letter of the prompt, its lower word, its ink, it is known in which of the 16 images it is right. What varies between
prefixes was decided by them, and what varies among the suffixes of one prefix is decided later: see
`agents.split_rule.variance_components`. The share is that of the variances summed over all letters, words or inks. Its
error is that of the jackknife over prompts, because the letters of a prompt share their images.

A letter counts where all 16 images show its word: a word that is left out is another family's fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from agents import Decoding
from agents.beside import attributes_by, faults_of
from agents.experiments.figures import save_figure
from agents.experiments.jackknife import jackknife_error
from agents.experiments.output import table
from agents.policies.base import Policy
from agents.rollout import Rollout, collect, resized
from agents.split_rule import SplitRule, variance_components
from rewards.text_metrics import normalize
from var_env import Scene, VARTextVectorEnv
from var_env.attributes import chances, counterparts, letter_fates
from var_env.faults import ALL_FAMILIES, Faults
from var_env.schedule import ScaleSchedule

PREFIXES, SUFFIXES = 4, 4
IMAGES = PREFIXES * SUFFIXES
PROMPTS_AT_ONCE = 4  # 64 images

Share = tuple[float, float] | None  # with its standard error; None where nothing varies


def letters_right(scene: Scene, words_read: Sequence[Sequence[str]], faults: Faults) -> NDArray[np.float64]:
    """Which affected letters of a prompt are right in each of its B images: ``(letters, B)`` of 0 and 1.

    Letters of words that one of the images does not show are left out.
    """
    partners = {normalize(first): normalize(second) for first, (second, _) in faults.letters.items()}
    words = [normalize(word) for text in scene.words for word in text.split()]
    shown = [counterparts(words, [normalize(word) for word in read]) for read in words_read]  # B of one a word
    rows = []
    for index, word in enumerate(words):
        of_word = [found[index] for found in shown]
        fates = [letter_fates(word, found, partners) for found in of_word if found is not None]
        if len(fates) == len(shown):
            rows += [
                [of_image[place] == "right" for of_image in fates]
                for place, letter in enumerate(word)
                if letter in partners
            ]
    return np.array(rows, np.float64).reshape(-1, len(words_read))


def values_by_prompt(rollout: Rollout, faults: Faults) -> list[dict[str, NDArray[np.float64]]]:
    """For each prompt and family what was right, 1 or 0, ``(things, IMAGES)``: letters, one an image, or none."""
    odds = chances(attributes_by(faults, rollout.images, rollout.scenes, rollout.words_read))
    found = []
    for start in range(0, len(rollout.scenes), IMAGES):
        here = slice(start, start + IMAGES)
        values = {"letter": letters_right(rollout.scenes[start], rollout.words_read[here], faults)}
        for family in odds.keys() - {"letter"}:
            possible, right = odds[family][:, here]
            values[family] = right[None].astype(np.float64) if possible.all() else np.zeros((0, IMAGES))
        found.append(values)
    return found


def decided_share(values: Sequence[NDArray[np.float64]]) -> Share:
    """The share of the variance within a prompt that the prefix decides.

    Args:
        values: of each prompt, ``(things, IMAGES)``, those of one prefix side by side; prompts without things drop out.

    Returns:
        The share, about 0 to 1 (a little below 0 by chance), and its standard error, NaN where one prompt alone varies;
        None where nothing varies.
    """
    parts = []
    for of_prompt in values:
        if len(of_prompt):
            returns = torch.as_tensor(of_prompt).view(-1, PREFIXES, SUFFIXES)
            parts.append(len(returns) * np.array(variance_components(returns)))  # (2,) between and within
    sums = np.array(parts).reshape(-1, 2)  # (prompts, 2)
    total = sums.sum(0)
    if not total.sum() > 0:
        return None
    without = total - sums  # (prompts, 2)
    rest = without.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out = np.where(rest > 1e-12, without[:, 0] / rest, np.nan)
    return float(total[0] / total.sum()), jackknife_error(left_out)


def fault_shares(
    policy: Policy,
    env: VARTextVectorEnv,
    scenes: Sequence[Scene],
    decoding: Decoding,
    seed: int = 0,
    faults: Faults | None = None,
) -> list[dict[str, Any]]:
    """For each split m its ``tokens`` and the share of each family that its prefix decides, a `Share`.

    Every m of a schedule of at most nine grids; of a longer one, as a raster's, eight that are spread over it. The
    faults are by default those of `faults_of`.
    """
    faults = faults_of(scenes) if faults is None else faults
    generator, sizes, rows = torch.Generator(policy.device).manual_seed(seed), policy.schedule.sizes, []
    for m in tqdm(SplitRule(tuple(sizes)).candidates, "splits", leave=False):
        values = []
        for start in range(0, len(scenes), PROMPTS_AT_ONCE):
            batch = list(scenes[start : start + PROMPTS_AT_ONCE])
            envs = resized(env, len(batch))
            rollout = collect(policy, envs, PREFIXES, decoding, generator, fork_at=(m, SUFFIXES), scenes=batch)
            values += values_by_prompt(rollout, faults)
        shares = {family: decided_share([of_prompt[family] for of_prompt in values]) for family in values[0]}
        rows.append({"m": m, "tokens": sum(sizes[:m]), **shares})
    return rows


def share_table(rows: Sequence[Mapping[str, Any]], schedule: ScaleSchedule) -> str:
    """A line for each m: the tokens of its prefix, and the shares with their errors."""

    def cell(share: Share) -> str:
        if share is None:
            return "no variance"
        return f"{share[0]:.1%}" + (f" +- {share[1]:.1%}" if math.isfinite(share[1]) else "")

    families = [family for family in ALL_FAMILIES if family in rows[0]]
    lines = [
        [f"{row['m']}", f"{row['tokens']}", f"{row['tokens'] / schedule.total_tokens:.1%}"]
        + [cell(row[family]) for family in families]
        for row in rows
    ]
    return table(["m", "Tokens", "Of all", *(family.capitalize() for family in families)], lines)


def draw_shares(path: Path, rows: Sequence[Mapping[str, Any]], schedule: ScaleSchedule) -> None:
    """The share that the prefix decides against m, a line a family, with standard errors."""
    figure = Figure(figsize=(6.5, 4.5))
    panel = figure.subplots()
    for family in [family for family in ALL_FAMILIES if family in rows[0]]:
        known = [(row["m"], *row[family]) for row in rows if row[family] is not None]
        if known:
            m, share, error = np.array(known, np.float64).T
            panel.errorbar(m, share, np.nan_to_num(error), marker="o", capsize=3, label=family)
    panel.set(
        xlabel=f"grids in the prefix, m of {len(schedule)}",
        ylabel="share of the fault's variance that the prefix decides",
        xlim=(0, len(schedule)),
        ylim=(-0.15, 1.1),
    )
    panel.grid(alpha=0.3)
    if panel.lines:
        panel.legend(loc="lower right")
    save_figure(path, figure)
