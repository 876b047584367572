"""What an agent writes to its logger, and under which names. Every number of an update is made here."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    Image,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    make_output_format,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from agents import pictures
from agents.losses import per_grid
from agents.rollout import Rollout
from var_env.schedule import ScaleSchedule

if TYPE_CHECKING:
    from agents.grpo import GRPO

EYES_ONLY = ("stdout", "log", "json", "csv")  # the writers that cannot show a picture


def open_logger(folder: str | Path, formats: Sequence[str], step: int | None = None) -> Logger:
    """Stable-Baselines3's ``configure``, for a new run or one that goes on.

    Args:
        folder: of the run.
        formats: "stdout", "log", "json", "csv", "tensorboard".
        step: of a run that goes on, ``num_timesteps`` of its checkpoint. What "csv" and "tensorboard" logged after it
            is taken back, since it will be logged again; the other files begin anew.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    kinds = {"csv": ContinuedCSV, "tensorboard": ContinuedTensorBoard}
    writers: list[KVWriter] = [
        make_output_format(name, str(folder)) if step is None or name not in kinds else kinds[name](Path(folder), step)
        for name in formats
    ]
    return Logger(str(folder), writers)


class ContinuedCSV(CSVOutputFormat):
    """progress.csv with the rows up to a step that it had before."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "progress.csv"
        before: list[dict[str, str]] = []
        if path.is_file():
            with open(path, newline="") as file:
                before = list(csv.DictReader(file))
        super().__init__(str(path))
        for row in before:
            if row["time/total_timesteps"] and int(row["time/total_timesteps"]) <= step:
                self.write({name: number(text) for name, text in row.items() if text}, {})


def number(text: str) -> float:
    """As Python wrote it, whole numbers as whole numbers."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """Events of which TensorBoard shows those up to a step, and then the new ones."""

    def __init__(self, folder: Path, step: int) -> None:
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)
        self._is_closed = False


def shows_pictures(logger: Logger) -> bool:
    """Whether a writer of this logger can show one; making it may be skipped otherwise."""
    return any(isinstance(writer, TensorBoardOutputFormat) for writer in logger.output_formats)


def bands_of(schedule: ScaleSchedule, steps: range) -> list[tuple[str, int]]:
    """What of ``steps`` has a curve of its own, by name, and its tokens: the scales, or the rows of a raster."""
    found = [(name, sum(schedule.sizes[t] for t in band if t in steps)) for name, band in schedule.bands]
    return [(name, tokens) for name, tokens in found if tokens]


def by_band(schedule: ScaleSchedule, steps: range, values: Sequence[float]) -> dict[str, float]:
    """One value a grid of ``steps`` as one a curve: its own or, of a raster, the mean over the row; NaN is left out."""
    found: dict[str, float] = {}
    for name, band in schedule.bands:
        here = [value for t, value in zip(steps, values, strict=True) if t in band and not math.isnan(value)]
        if here:
            found[name] = sum(here) / len(here)
    return found


def record_rollout(logger: Logger, rollout: Rollout) -> None:
    """``rollout/``: reward, its spread and parts; ``time/``: the phases of sampling."""
    for name, value in rollout.summary().items():
        logger.record_mean(f"rollout/{name}", value)  # over all that were sampled since the last line of the log
    for phase, seconds in rollout.seconds.items():
        logger.record_mean(f"time/{phase}", seconds)


def record_samples(logger: Logger, rollout: Rollout, prompts: int = 4, columns: int = 8) -> None:
    """``samples/``: pictures of the first prompts with what was read in them, and a table of the same."""
    if not shows_pictures(logger):
        return
    per_prompt = rollout.returns[0].numel()  # G * K
    shown = [i for i in range(len(rollout.images)) if i // per_prompt < prompts and i % per_prompt < columns]
    returns, reads = rollout.returns.flatten().tolist(), [" ".join(words) for words in rollout.words_read]
    scenes = {i: rollout.scenes[i // rollout.suffixes] for i in shown}
    captions = [pictures.caption(scenes[i].words, rollout.words_read[i], returns[i]) for i in shown]
    sheet = pictures.sample_sheet(rollout.images[shown], captions, min(columns, per_prompt))
    logger.record("samples/images", Image(sheet, "HWC"), exclude=EYES_ONLY)
    lines = [f"| {scenes[i].prompt} | {reads[i]} | {returns[i]:.2f} |" for i in shown]
    logger.record("samples/read", "\n".join(["| prompt | read | score |", "|---|---|---|", *lines]), exclude=EYES_ONLY)


class Tokens(NamedTuple):
    """What an update saw at each token, detached, ``(B, n)`` each; ``kl`` is zero without a reference."""

    policy_loss: Tensor  # the clipped loss
    kl: Tensor  # to the reference
    entropy: Tensor
    policy_weight: Tensor  # what these three are multiplied with in the loss, coefficients included
    kl_weight: Tensor
    entropy_weight: Tensor
    ratio: Tensor
    behaviour_gap: Tensor  # log sampler - log old policy


def approx_kl(seen: Sequence[Tokens]) -> float:
    """KL of the policy that sampled to the present one, a mean over tokens: k3 the other way round."""
    ratio = torch.cat([tokens.ratio for tokens in seen])
    return ((ratio - 1) - ratio.log()).mean().item()


def record_update(
    logger: Logger, seen: Sequence[Tokens], optimizer_steps: int, steps: range, schedule: ScaleSchedule, agent: GRPO
) -> None:
    """``train/``: the losses that were minimised and their diagnosis; ``scale/``: the same for each scale of ``steps``.

    Losses are means over the optimiser steps. Rows with nothing to learn may be missing in ``seen``.
    """
    tokens = Tokens(*(torch.cat(part) for part in zip(*seen, strict=True)))
    has_kl, has_bonus = bool(tokens.kl_weight.any()), bool(tokens.entropy_weight.any())
    terms = {
        "policy_loss": tokens.policy_weight * tokens.policy_loss,
        "kl_loss": tokens.kl_weight * tokens.kl,
        "entropy_loss": -tokens.entropy_weight * tokens.entropy,
    }  # (B, n)
    means = {name: part.sum() / optimizer_steps for name, part in terms.items()}
    ratio, high = tokens.ratio, agent.clip_range if agent.clip_range_high is None else agent.clip_range_high
    values = {
        "train/loss": sum(means.values(), start=torch.zeros(())),
        "train/policy_loss": means["policy_loss"],
        "train/entropy": tokens.entropy.mean(),
        "train/clip_fraction": ((ratio < 1 - agent.clip_range) | (ratio > 1 + high)).float().mean(),
        "train/ratio_mean": ratio.mean(),
        "train/ratio_min": ratio.min(),
        "train/ratio_max": ratio.max(),
        "rollout/behaviour_gap": tokens.behaviour_gap.mean(),
    }
    if has_kl:
        values |= {"train/kl": tokens.kl.mean(), "train/kl_loss": means["kl_loss"]}
    if has_bonus:
        values["train/entropy_loss"] = means["entropy_loss"]
    names, sizes = zip(*bands_of(schedule, steps), strict=True)
    size = torch.stack([part.abs() for part in terms.values()]).sum(0)  # (B, n)
    share = per_grid(size, sizes).sum(0)  # (bands,)
    share = share / share.sum().clamp(min=1e-12)
    entropy, kl = (per_grid(part, sizes).mean(0) / torch.tensor(sizes).to(part) for part in (tokens.entropy, tokens.kl))
    for i, name in enumerate(names):
        values |= {f"scale/entropy_{name}": entropy[i], f"scale/loss_share_{name}": share[i]}
        if has_kl:
            values[f"scale/kl_{name}"] = kl[i]
    logger.record("train/approx_kl", approx_kl(seen))
    for key, value in values.items():
        logger.record(key, value.item())
