"""What an agent writes to its logger, and under which names. Every number of an update is made here."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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

from agents.common import pictures
from agents.common.processes import Processes, current
from agents.losses import per_grid
from agents.rollout import Rollout
from agents.trackers import WandbOutput
from rewards.old_names import keep_old_names
from var_env.schedule import ScaleSchedule

WITHOUT_IMAGES = ("stdout", "log", "json", "csv")  # the writers that cannot show an image


def open_logger(folder: str | Path, formats: Sequence[str], step: int | None = None) -> Logger:
    """Stable-Baselines3's ``configure``, for a new run or one that goes on.

    Args:
        folder: of the run.
        formats: "stdout", "log", "json", "csv", "tensorboard", "wandb".
        step: of a run that goes on, ``images_decoded`` of its checkpoint. What "csv" and "tensorboard" logged after it
            is taken back, since it will be logged again; the other files begin anew.

    Of several processes the first one logs, and the others get a logger that writes nothing.
    """
    if not current().is_first:
        return Logger(None, [])
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Logger(str(folder), [open_writer(Path(folder), name, step) for name in formats])


def open_writer(folder: Path, name: str, step: int | None) -> KVWriter:
    """One of the formats of `open_logger`."""
    if name == "wandb":
        return WandbOutput(folder, step)
    kinds = {"csv": ContinuedCSV, "tensorboard": ContinuedTensorBoard}
    if step is None or name not in kinds:
        return make_output_format(name, str(folder))
    return kinds[name](folder, step)


class ContinuedCSV(CSVOutputFormat):
    """progress.csv with the rows up to a step that it had before. An evaluation at that step is made again."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "progress.csv"
        before: list[dict[str, str]] = []
        if path.is_file():
            with open(path, newline="") as file:
                before = list(csv.DictReader(file))
        super().__init__(str(path))
        for row in before:
            trained = row.get("budget/images")
            images = trained or row.get("eval/images")
            if images and int(images) <= step and (trained or int(images) < step):
                self.write({name: number(text) for name, text in row.items() if text}, {})


def number(text: str) -> float:
    """As Python wrote it, whole numbers as whole numbers."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """Events of which TensorBoard shows those up to a step, and then the new ones."""

    def __init__(self, folder: Path, step: int) -> None:
        # TensorBoard reads files in the order of their names, which begin with the second that they were made in.
        made = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
        wait = max(made, default=0) + 1 - time.time()
        if 0 < wait <= 1:
            time.sleep(wait)
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)
        self._is_closed = False


def shows_images(logger: Logger) -> bool:
    """Whether a writer of this logger can show one; making it may be skipped otherwise."""
    return any(isinstance(writer, TensorBoardOutputFormat | WandbOutput) for writer in logger.output_formats)


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


def record_rollout(logger: Logger, rollout: Rollout, processes: Processes) -> None:
    """``rollout/``: reward, its spread and parts, over all processes; ``time/``: the phases of sampling."""
    for name, value in rollout.summary(processes).items():
        logger.record_mean(f"rollout/{name}", value)  # over all that were sampled since the last line of the log
    for phase, seconds in rollout.seconds.items():
        logger.record_mean(f"time/{phase}", seconds)


def record_samples(logger: Logger, rollout: Rollout, prompts: int = 4, columns: int = 8) -> None:
    """``samples/``: images of the first prompts with what was read in them, and a table of the same.

    Where the reward says which parts of it come from where, such as letters, the images stand there with their boxes,
    green for right and red for wrong, as ``samples/components``.
    """
    if not shows_images(logger):
        return
    per_prompt = rollout.returns[0].numel()  # G * K
    shown = [i for i in range(len(rollout.images)) if i // per_prompt < prompts and i % per_prompt < columns]
    returns, reads = rollout.returns.flatten().tolist(), [" ".join(words) for words in rollout.words_read]
    scenes = {i: rollout.scenes[i // rollout.suffixes] for i in shown}
    captions = [pictures.caption(scenes[i].words, rollout.words_read[i], returns[i]) for i in shown]
    sheet = pictures.sample_sheet(rollout.images[shown], captions, min(columns, per_prompt))
    logger.record("samples/images", Image(sheet, "HWC"), exclude=WITHOUT_IMAGES)
    components = [rollout.components[i] for i in shown]
    if any(part.boxes is not None for found in components for part in found):
        sheet = pictures.component_sheet(rollout.images[shown], components, captions, min(columns, per_prompt))
        logger.record("samples/components", Image(sheet, "HWC"), exclude=WITHOUT_IMAGES)
    lines = [f"| {scenes[i].prompt} | {reads[i]} | {returns[i]:.2f} |" for i in shown]
    logger.record(
        "samples/read",
        "\n".join(["| prompt | read | score |", "|---|---|---|", *lines]),
        exclude=WITHOUT_IMAGES,
    )


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


def approx_kl(seen: Sequence[Tokens], processes: Processes = Processes()) -> float:  # noqa: B008 (alone)
    """KL of the policy that sampled to the present one, a mean over tokens: k3 the other way round."""
    values = [((tokens.ratio - 1) - tokens.ratio.log()).double() for tokens in seen]
    return processes.mean(sum(part.sum().item() for part in values), sum(part.numel() for part in values))


def record_update(
    logger: Logger,
    seen: Sequence[Tokens],
    *,
    optimizer_steps: int,
    steps: range,
    schedule: ScaleSchedule,
    clip: tuple[float, float],
    processes: Processes,
) -> None:
    """``train/``: the losses that were minimised and their diagnosis; ``scale/``: the same for each scale of ``steps``.

    Losses are means over the optimiser steps. Rows with nothing to learn may be missing in ``seen``. Of all processes.
    Ratios count as clipped below ``1 - clip[0]`` and above ``1 + clip[1]``.
    """
    seen = seen or [Tokens(*[torch.zeros(0, sum(schedule.sizes[t] for t in steps))] * len(Tokens._fields))]
    tokens = Tokens(*(torch.cat(part).double() for part in zip(*seen, strict=True)))  # (b, n)
    terms = {
        "policy_loss": tokens.policy_weight * tokens.policy_loss,
        "kl_loss": tokens.kl_weight * tokens.kl,
        "entropy_loss": -tokens.entropy_weight * tokens.entropy,
    }  # (b, n)
    ratio, (low, high) = tokens.ratio, clip
    averaged = {
        "train/entropy": tokens.entropy,
        "train/clip_fraction": (ratio < 1 - low) | (ratio > 1 + high),
        "train/ratio_mean": ratio,
        "train/kl": tokens.kl,
        "rollout/behaviour_gap": tokens.behaviour_gap,
    }  # (b, n)
    names, sizes = zip(*bands_of(schedule, steps), strict=True)
    size = torch.stack([part.abs() for part in terms.values()]).sum(0)  # (b, n)
    by_name = torch.stack([per_grid(part, sizes).sum(0) for part in (size, tokens.entropy, tokens.kl)])  # (3, bands)
    sums = [ratio.numel(), *(part.double().sum().item() for part in (*terms.values(), *averaged.values()))]
    reduced = processes.reduce([*sums, *by_name.flatten().tolist()])
    losses, means = reduced[1:4], [value / max(reduced[0], 1) for value in reduced[4:9]]
    shares, entropies, kls = torch.tensor(reduced[9:]).view(3, -1)
    extremes = [-ratio.min().item(), ratio.max().item()] if ratio.numel() else [-math.inf, -math.inf]
    extremes += [float(bool(part.any())) for part in (tokens.kl_weight, tokens.entropy_weight)]
    negative_min, top, has_kl, has_bonus = processes.reduce(extremes, "max")
    values = {f"train/{name}": total / optimizer_steps for name, total in zip(terms, losses, strict=True)}
    values |= {"train/loss": sum(values.values()), **dict(zip(averaged, means, strict=True))}
    values |= {"train/ratio_min": -negative_min, "train/ratio_max": top, "train/approx_kl": approx_kl(seen, processes)}
    rows = max(reduced[0] / sum(sizes), 1)
    share = shares / shares.sum().clamp(min=1e-12)
    for i, name in enumerate(names):
        values |= {
            f"scale/entropy_{name}": entropies[i].item() / (rows * sizes[i]),
            f"scale/loss_share_{name}": share[i].item(),
            f"scale/kl_{name}": kls[i].item() / (rows * sizes[i]),
        }
    missing = [] if has_kl else ["train/kl", "train/kl_loss", *(f"scale/kl_{name}" for name in names)]
    missing += [] if has_bonus else ["train/entropy_loss"]
    for key, value in values.items():
        if key not in missing:
            logger.record(key, value)


keep_old_names(globals(), EYES_ONLY="WITHOUT_IMAGES", shows_pictures="shows_images")
