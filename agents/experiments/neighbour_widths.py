"""How often the reading changes when tokens are swapped for their neighbours, for ``vartext sweep --neighbour-width``.

`soft_codes` treats the codes of a neighbourhood as one, and is as good as the neighbours are alike to the reward. So
one image is drawn for each prompt, all of its tokens are swapped at once for codes drawn from the kernel of a width,
and the reward reads the image again. An update swaps nothing: what it takes from a neighbour is weighted by the
policy's probability of it as well, so that the share here is an upper estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agents import Decoding
from agents.experiments.output import table
from agents.policies.base import Policy
from agents.rollout import collect, resized
from agents.soft_codes import draw_neighbours, log_kernel
from var_env import Scene, VARTextVectorEnv
from var_env.tokenizers.base import VisualTokenizer

IMAGES_AT_ONCE = 64


def decoded(tokenizer: VisualTokenizer, grids: Sequence[Tensor]) -> np.ndarray:
    """The images of T grids ``(B, n_t, D)``: uint8 ``(B, S, S, 3)``."""
    canvas = tokenizer.blank(len(grids[0]))
    for t, grid in enumerate(grids):
        canvas = tokenizer.write(t, canvas, grid)
    return tokenizer.decode(canvas).cpu().numpy()


def neighbour_widths(
    policy: Policy,
    env: VARTextVectorEnv,
    scenes: Sequence[Scene],
    decoding: Decoding,
    widths: Sequence[float],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """For each width what its swaps change, every width on the same images.

    Returns:
        Rows of ``width``; ``swapped``, the share of the codes that are others after it; ``read``, the share of the
        images in which other words are read, with its standard error ``read_error``; and ``reward``, the mean absolute
        change of the reward.

    Raises:
        ValueError: a width that is not above 0.
    """
    if not all(width > 0 for width in widths):
        raise ValueError(f"--neighbour-width must be above 0, got {min(widths)}")
    generator = torch.Generator(policy.device).manual_seed(seed)
    distances = policy.tokenizer.code_distances().to(policy.device)
    changed: dict[float, list[np.ndarray]] = {width: [] for width in widths}
    for start in tqdm(range(0, len(scenes), IMAGES_AT_ONCE), "images", leave=False):
        batch = list(scenes[start : start + IMAGES_AT_ONCE])
        drawn = collect(policy, resized(env, len(batch)), 1, decoding, generator, scenes=batch)
        for width in widths:
            kernel = log_kernel(distances, width)
            grids = [draw_neighbours(grid, kernel, generator) for grid in drawn.grids]
            answer = env.reward(decoded(policy.tokenizer, grids), batch)
            pairs = zip(drawn.grids, grids, strict=True)
            swapped = torch.cat([(one != two).float().flatten(1) for one, two in pairs], 1).mean(1)  # (B,)
            read = [one != two for one, two in zip(drawn.words_read, answer.words, strict=True)]
            apart = np.abs(np.asarray(answer.scores) - drawn.scores.flatten().numpy())
            changed[width].append(np.stack([swapped.cpu().numpy(), read, apart]))
    rows = []
    for width, parts in changed.items():
        swapped, read, apart = np.concatenate(parts, 1).mean(1).tolist()
        error = (read * (1 - read) / len(scenes)) ** 0.5
        rows.append({"width": width, "swapped": swapped, "read": read, "read_error": error, "reward": apart})
    return rows


def width_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each width."""
    lines = [
        [
            f"{row['width']:g}",
            f"{row['swapped']:.1%}",
            f"{row['read']:.1%} +- {row['read_error']:.1%}",
            f"{row['reward']:.3f}",
        ]
        for row in rows
    ]
    return table(["Width", "Codes swapped", "Images read otherwise", "Change of the reward"], lines)
