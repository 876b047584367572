"""`attributes` of the room: the letters and words as everywhere, and the colours and the pattern of its grounds.

The ground is fitted: of all patterns in all pairs of colours it is the one nearest to the pixels. A pixel counts no
more than a fixed distance, so that ink does not matter. The ink is the mean of the pixels that are farthest from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from var_env.attributes import (
    COLOURS,
    INK_DISTANCE,
    NAMES,
    VALUES,
    Record,
    check_batch,
    contrast_ratio,
    count_runs,
    flags,
    ink_on,
    nearest_colours,
    text_attributes,
)
from var_env.room import NAMED, RoomFaults, pattern_asked, pattern_mask, patterned
from var_env.scenes import PALETTE, Scene

STRIDE = 3  # px between the pixels that the fit looks at
FARTHEST = 60.0  # RGB levels; what is farther from the ground is something else
PAIRS = [pair for kind in PALETTE.values() for pair in permutations(kind, 2)]  # ground and second colour, 24
FIRST, SECOND = ([NAMES.index(name) for name in names] for names in zip(*PAIRS, strict=True))


def room_attributes(
    images: NDArray[np.uint8], scenes: Sequence[Scene], words_read: Sequence[Sequence[str]] | None, faults: RoomFaults
) -> Record:
    """What each of B images of the room has of what its scene asks for.

    Args:
        images, words_read: as in `attributes`.
        scenes: B scenes of the room as they were asked for, drawn or made from its prompts.
        faults: the room's table.

    Returns:
        What `attributes` returns, where pairs_affected tells that one of the words may be left out, with

        - pattern_affected: 1 where the pattern asked for is in the table;
        - pattern_right, pattern_confused: 1 where the ground shows the pattern asked for, or its partner;
        - second_right: 1 where the pattern has the colour asked for.

    Raises:
        ValueError: as in `attributes`.
    """
    check_batch(images, scenes, words_read)
    asked = [pattern_asked(scene) or {} for scene in scenes]
    text = text_attributes(scenes, words_read, faults, [of.get("ground") for of in asked])
    pixels = images.astype(np.float32)
    patterns, grounds, seconds = fitted(pixels)
    background = np.stack(
        [
            patterned(pattern, COLOURS[ground], COLOURS[second], images.shape[1])
            for pattern, ground, second in zip(patterns, grounds, seconds, strict=True)
        ]
    )  # (B, H, W, 3)
    ink, farthest = ink_on(pixels, background)  # (B, 3), (B,)
    visible = farthest >= INK_DISTANCE**2
    inks = [name if seen else None for name, seen in zip(nearest_colours(ink), visible, strict=True)]
    towards = ink[:, None, None] - background  # (B, H, W, 3)
    near = ((pixels - background) * towards).sum(3) > (towards**2).sum(3) / 2

    def told(name: str, shown: Sequence[str | None]) -> NDArray[np.float32]:
        return flags(of[name] == there if of else None for of, there in zip(asked, shown, strict=True))

    partners = {first: second for first, (second, _) in faults.patterns.items()}
    colours = {first: second for first, (second, _) in faults.colours.items()}
    return text | {
        "lines_shown": np.where(visible, count_runs(near), 0).astype(np.float32),
        "ink_affected": flags(of["ink"] in colours if of else None for of in asked),
        "ink_right": told("ink", inks),
        "ink_confused": flags(
            of["ink"] in colours and colours[of["ink"]] == there if of else None
            for of, there in zip(asked, inks, strict=True)
        ),
        "ground_right": told("ground", grounds),
        "contrast": contrast_ratio(ink, np.array([COLOURS[name] for name in grounds], np.float32)),
        "pattern_affected": flags(of["pattern"] in partners if of else None for of in asked),
        "pattern_right": told("pattern", patterns),
        "pattern_confused": flags(
            partners.get(of["pattern"]) == there if of else None for of, there in zip(asked, patterns, strict=True)
        ),
        "second_right": told("second", seconds),
    }


def fitted(pixels: NDArray[np.float32]) -> tuple[list[str], list[str], list[str]]:
    """The names of the pattern, the ground and the second colour that fit each of B images (B, H, W, 3) best."""
    start = STRIDE // 2
    points = pixels[:, start::STRIDE, start::STRIDE].reshape(len(pixels), -1, 3)  # (B, P, 3)
    apart = np.stack([_clipped(points - colour) for colour in VALUES], 1)  # (B, 8, P)
    costs = []
    for name in NAMED:
        share = pattern_mask(name, pixels.shape[1])[start::STRIDE, start::STRIDE].reshape(-1)  # (P,)
        if set(np.unique(share)) <= {0.0, 1.0}:  # two colours and none between them
            costs.append((apart @ (1 - share))[:, FIRST] + (apart @ share)[:, SECOND])
        else:
            mixes = VALUES[FIRST, None] + share[:, None] * (VALUES[SECOND] - VALUES[FIRST])[:, None]  # (24, P, 3)
            costs.append(np.stack([_clipped(points - mix).sum(1) for mix in mixes], 1))
    best = np.stack(costs, 1).reshape(len(pixels), -1).argmin(1)  # over (8, 24)
    names = list(NAMED)
    pairs = [PAIRS[i] for i in best % len(PAIRS)]
    return [names[i] for i in best // len(PAIRS)], [ground for ground, _ in pairs], [second for _, second in pairs]


def _clipped(difference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances (..., 3) to (...), at most that of `FARTHEST`."""
    return np.minimum(np.einsum("...c,...c->...", difference, difference), FARTHEST**2)
