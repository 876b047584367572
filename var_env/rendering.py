"""Frames of an episode: the image as decoded so far beside the token grids, or the same as a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from var_env.mdp import State, row_of
from var_env.tokenizers.base import VisualTokenizer

FRAME = 256  # px, the least height of a frame
GAP = 4  # px around each grid
PAPER = 32  # grey level behind the grids; a grid that is still to come stays a little lighter
COLOURS = 4096  # codes beyond use them again
SHOWN = 12  # tokens of a grid that a line of text shows


def rgb_frame(tokenizer: VisualTokenizer, state: State, row: int) -> np.ndarray:
    """Image and grids side by side: uint8 ``(P, P + panel, 3)``, of the same size at every step."""
    if state.outcome is not None:
        image = state.outcome["image"][row]
    else:
        image = tokenizer.decode(state.canvas[row : row + 1])[0].cpu().numpy()  # (S, S, 3)
    zoom = max(1, FRAME // len(image))
    image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)  # (P, P, 3)
    return np.concatenate([image, _grid_panel(tokenizer, state, row, len(image))], axis=1)


def text_frame(tokenizer: VisualTokenizer, state: State, row: int) -> str:
    """Scale, prompt and one line a grid; at the end also the score and the text that was read."""
    schedule = tokenizer.schedule
    lines = [f"VARText  scale {state.t} of {len(schedule)}  {state.scenes[row].prompt}"]
    codes = _codes(tokenizer, state, row)  # (L,)
    for name, steps in schedule.bands:
        seen = codes[schedule.slices[steps.start].start : schedule.slices[steps[-1]].stop]
        tokens = [str(code) for code in seen if code >= 0] or ["."]
        more = f" ... ({len(tokens)} tokens)" if len(tokens) > SHOWN else ""
        lines.append(name.removeprefix(f"{steps.start + 1}_").rjust(7) + "  " + " ".join(tokens[:SHOWN]) + more)
    if state.outcome is not None:
        end = row_of(state.outcome, row)
        lines.append(f"  score {end['score']:.3f}  read {_quoted(end)}")
    return "\n".join(lines)


def _codes(tokenizer: VisualTokenizer, state: State, row: int) -> np.ndarray:
    """One number a token, -1 where there is none yet: int64 ``(L,)``. Several codes are the digits of one number; the
    values of the digits are taken modulo a prime of 31 bits, so that 64 bits a token do not overflow."""
    tokens = state.tokens[row].reshape(tokenizer.schedule.total_tokens, -1)  # (L, D)
    values = np.array([pow(tokenizer.vocab_size, d, 2**31 - 1) for d in range(tokens.shape[1])])
    return np.where(tokens[:, 0] < 0, -1, tokens @ values)


def _quoted(end: Mapping[str, Any]) -> str:
    return " ".join(f'"{word}"' for word in end["words_read"]) or "nothing"


def _grid_panel(tokenizer: VisualTokenizer, state: State, row: int, height: int) -> np.ndarray:
    """The T grids as colour tiles, a colour a code, in reading order: uint8 ``(height, panel, 3)``."""
    schedule = tokenizer.schedule
    columns = math.ceil(math.sqrt(len(schedule)))
    cell = height // math.ceil(len(schedule) / columns)
    side = max(cell - 2 * GAP, 1)
    panel = np.full((height, columns * cell, 3), PAPER, np.uint8)
    codes = _codes(tokenizer, state, row)
    for t, (h, w) in enumerate(schedule.grids):
        top, left = GAP + t // columns * cell, GAP + t % columns * cell
        tile = panel[top : top + side, left : left + side]
        if t < state.t:
            colours = _palette()[codes[schedule.slices[t]].reshape(h, w) % COLOURS]
            tile[:] = colours[np.arange(side) * h // side][:, np.arange(side) * w // side]
        else:
            tile[:] = PAPER + 16
    return panel


@cache
def _palette() -> np.ndarray:
    """One colour a code, neighbours in the codebook far apart in hue: uint8 ``(COLOURS, 3)``."""
    code = np.arange(COLOURS)[:, None]
    hue, value = code * 0.618034 % 1, 0.55 + 0.45 * (code * 0.754878 % 1)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3])))
    return (255 * value * wave).astype(np.uint8)
