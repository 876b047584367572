"""What an agent writes to its logger, and under which names. Every number of an update is made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from stable_baselines3.common.logger import Image, Logger, TensorBoardOutputFormat
from torch import Tensor

from agents import pictures
from agents.losses import per_grid
from agents.rollout import Rollout
from var_env.schedule import ScaleSchedule

EYES_ONLY = ("stdout", "log", "json", "csv")  # the writers that cannot show a picture


def shows_pictures(logger: Logger) -> bool:
    """Whether a writer of this logger can show one; making it may be skipped otherwise."""
    return any(isinstance(writer, TensorBoardOutputFormat) for writer in logger.output_formats)


def scale_name(schedule: ScaleSchedule, t: int) -> str:
    """``4_4x4``: the scale's number, from 1, and its grid, as the names of its curves end."""
    h, w = schedule.grids[t]
    return f"{t + 1}_{h}x{w}"


def record_rollout(logger: Logger, rollout: Rollout) -> None:
    """``rollout/``: reward, its spread and parts; ``time/``: the phases of sampling."""
    for name, value in rollout.summary().items():
        logger.record(f"rollout/{name}", value)
    for phase, seconds in rollout.seconds.items():
        logger.record(f"time/{phase}", seconds)


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
    policy_weight: Tensor
    kl_weight: Tensor  # the coefficient included
    ratio: Tensor
    entropy: Tensor
    behaviour_gap: Tensor  # log sampler - log old policy


def record_update(
    logger: Logger,
    seen: Sequence[Tokens],
    rows: int,
    steps: range,
    schedule: ScaleSchedule,
    clip_range: float,
    has_kl: bool,
) -> None:
    """``train/``: the losses that were minimised and their diagnosis; ``scale/``: the same for each grid of ``steps``.

    Losses are means over ``rows`` samples, of which those with nothing to learn may be missing in ``seen``.
    """
    tokens = Tokens(*(torch.cat(part) for part in zip(*seen, strict=True)))
    policy_terms, kl_terms = tokens.policy_weight * tokens.policy_loss, tokens.kl_weight * tokens.kl  # (B, n)
    policy_loss, kl_loss = policy_terms.sum() / rows, kl_terms.sum() / rows
    ratio = tokens.ratio
    values = {
        "train/loss": policy_loss + kl_loss,
        "train/policy_loss": policy_loss,
        "train/entropy": tokens.entropy.mean(),
        "train/approx_kl": ((ratio - 1) - ratio.log()).mean(),  # to the old policy: k3 the other way round
        "train/clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
        "train/ratio_mean": ratio.mean(),
        "train/ratio_min": ratio.min(),
        "train/ratio_max": ratio.max(),
        "rollout/behaviour_gap": tokens.behaviour_gap.mean(),
    }
    if has_kl:
        values |= {"train/kl": tokens.kl.mean(), "train/kl_loss": kl_loss}
    sizes = [schedule.sizes[t] for t in steps]
    share = per_grid(policy_terms.abs() + kl_terms.abs(), sizes).sum(0)  # (grids,)
    share = share / share.sum().clamp(min=1e-12)
    entropy, kl = (per_grid(part, sizes).mean(0) / torch.tensor(sizes).to(part) for part in (tokens.entropy, tokens.kl))
    for i, t in enumerate(steps):
        name = scale_name(schedule, t)
        values |= {f"scale/entropy_{name}": entropy[i], f"scale/loss_share_{name}": share[i]}
        if has_kl:
            values[f"scale/kl_{name}"] = kl[i]
    for key, value in values.items():
        logger.record(key, value.item())
