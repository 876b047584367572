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


def record_rollout(logger: Logger, rollout: Rollout) -> None:
    """``rollout/``: reward, its spread and parts; ``time/``: the phases of sampling."""
    for name, value in rollout.summary().items():
        logger.record(f"rollout/{name}", value)
    for phase, seconds in rollout.seconds.items():
        logger.record(f"time/{phase}", seconds)


def record_samples(logger: Logger, rollout: Rollout, prompts: int = 4, columns: int = 8) -> None:
    """``samples/``: pictures of the first prompts with what was read in them, and a table of the same."""
    if not any(isinstance(writer, TensorBoardOutputFormat) for writer in logger.output_formats):
        return
    group = rollout.scores.shape[1]
    shown = [row for row in range(len(rollout.scenes)) if row // group < prompts and row % group < columns]
    scores = rollout.scores.flatten().tolist()
    captions = [pictures.caption(rollout.scenes[r].words, rollout.words_read[r], scores[r]) for r in shown]
    sheet = pictures.sample_sheet(rollout.images[shown], captions, min(columns, group))
    logger.record("samples/images", Image(sheet, "HWC"), exclude=EYES_ONLY)
    lines = [f"| {rollout.scenes[r].prompt} | {' '.join(rollout.words_read[r])} | {scores[r]:.2f} |" for r in shown]
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
        name = f"{t + 1}_{schedule.grids[t][0]}x{schedule.grids[t][1]}"
        values |= {f"scale/entropy_{name}": entropy[i], f"scale/loss_share_{name}": share[i]}
        if has_kl:
            values[f"scale/kl_{name}"] = kl[i]
    for key, value in values.items():
        logger.record(key, value.item())
