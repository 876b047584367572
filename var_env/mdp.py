"""The decision process that the single and the batched environment share, as functions of an immutable state.

A state is a prompt and the grids so far. An action is the next whole grid, and the transition appends it. The reward is
zero until the last grid; then it is the score of the decoded image. This is the process of "VAR RL Done Right", section
3.1, begun one step earlier, because the first grid is an action here too. Nothing here draws a random number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from torch import Tensor

from var_env.prompts import PromptWorld
from var_env.scenes import MAX_PROMPT_BYTES, Scene, World, encode_prompt, scene_from_prompt
from var_env.tokenizers.base import VisualTokenizer
from var_env.tokenizers.registry import load_tokenizer
from var_env.unfamiliar import warn_of_prompt
from var_env.worlds import SMALL, make_world, shipped_tokenizer

if TYPE_CHECKING:
    from rewards.base import Reward, RewardOutput


@dataclass(frozen=True)
class State:
    """``N`` episodes at the same step. Never changed in place, so clones and forks may share its arrays.

    Attributes:
        scenes: N scenes, of which the prompt is what the policy sees.
        prompts: the prompts' bytes, uint8 ``(N, limit)``.
        tokens: all tokens so far on the flat axis, int64 ``(N, L)``, -1 where nothing was sampled yet; ``(N, L, D)``
            when a token has D > 1 codes.
        grids: the grids so far, each int64 ``(N, n_t, D)`` on the tokenizer's device.
        canvas: the tokenizer's canvas of these grids, N rows.
        outcome: what the reward found, one entry a row as in a terminal ``info``; ``None`` before the end.
    """

    scenes: tuple[Scene, ...]
    prompts: np.ndarray
    tokens: np.ndarray
    grids: tuple[Tensor, ...]
    canvas: Tensor
    outcome: dict[str, Any] | None = None

    @property
    def t(self) -> int:
        """The scale to be predicted next, 0 to T; T means that the episode is over."""
        return len(self.grids)


def start(tokenizer: VisualTokenizer, scenes: Sequence[Scene], limit: int = MAX_PROMPT_BYTES) -> State:
    """``s_0``: the prompts alone. ``ValueError`` for a prompt of more than ``limit`` bytes."""
    return State(
        scenes=tuple(scenes),
        prompts=np.stack([encode_prompt(scene.prompt, limit) for scene in scenes]),
        tokens=np.full((len(scenes), tokenizer.schedule.total_tokens, *code_shape(tokenizer)), -1, np.int64),
        grids=(),
        canvas=tokenizer.blank(len(scenes)),
    )


def step(tokenizer: VisualTokenizer, reward: Reward, state: State | None, action: Any, batched: bool) -> State:
    """Read the action, append it and, after the last grid, score the image. The given state stays as it is.

    Raises:
        ResetNeeded: there is no episode, or it is over.
        ValueError: the action is no grid of this step, or, from the reward, a score is not a finite number.
    """
    state = advance(tokenizer, state, action, batched)
    return finish(tokenizer, reward, state) if state.t == len(tokenizer.schedule) else state


def advance(tokenizer: VisualTokenizer, state: State | None, action: Any, batched: bool) -> State:
    """The part of :func:`step` before the score: read the action and append it."""
    state = require(state)
    if state.t == len(tokenizer.schedule):
        raise ResetNeeded(f"the episode ended after its {state.t} grids: call reset() before the next step")
    return append(tokenizer, state, read_action(tokenizer, state.t, len(state.scenes), action, batched))


def require(state: State | None) -> State:
    """The state, or ``ResetNeeded`` when there is none yet."""
    if state is None:
        raise ResetNeeded("there is no episode yet: call reset() first")
    return state


def read_action(tokenizer: VisualTokenizer, t: int, batch: int, action: Any, batched: bool) -> np.ndarray:
    """Check an action for grid t and return its tokens, int64 ``(N, n_t, D)``.

    An action is an array or tensor of integers: the whole canvas ``(H, W)``, of which the top-left ``h_t x w_t``
    corner counts, or the exact grid ``(h_t, w_t)``. With ``batched`` it has a leading axis of N, and the grid may
    also be flat, as policies give it: ``(N, n_t)`` or ``(N, n_t, 1)``. Where a token has D > 1 codes, each of these has
    a last axis of D.
    """
    (h, w), (height, width) = tokenizer.schedule.grids[t], tokenizer.schedule.grids[-1]
    rows, code = (batch,) if batched else (), code_shape(tokenizer)
    try:
        array = action.detach().cpu().numpy() if isinstance(action, Tensor) else np.asarray(action)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the action at scale {t} is no array of integers: {error}") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"the action at scale {t} must hold integers, got dtype {array.dtype}")
    flat = ((batch, h * w, *code), (batch, h * w, tokenizer.depth))
    if array.shape == (*rows, height, width, *code):
        tokens = array[:, :h, :w] if batched else array[:h, :w]
    elif array.shape == (*rows, h, w, *code) or (batched and array.shape in flat):
        tokens = array
    else:
        raise ValueError(
            f"the action at scale {t} must have the shape of the canvas, {(*rows, height, width, *code)}, "
            f"or of its grid, {(*rows, h, w, *code)}; got {array.shape}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"the action at scale {t} holds the token {wrong}: use 0 to {tokenizer.vocab_size - 1}")
    return tokens.reshape(batch, h * w, tokenizer.depth).astype(np.int64)


def code_shape(tokenizer: VisualTokenizer) -> tuple[int, ...]:
    """The axes that a token has in actions and observations: none, or ``(D,)`` when it has several codes."""
    return () if tokenizer.depth == 1 else (tokenizer.depth,)


@torch.no_grad()
def append(tokenizer: VisualTokenizer, state: State, tokens: np.ndarray) -> State:
    """The state with one more grid, its tokens ``(N, n_t, D)`` as :func:`read_action` returns them."""
    t = state.t
    flat = state.tokens.copy()  # (N, L) or (N, L, D)
    here = flat[:, tokenizer.schedule.slices[t]]  # a view
    here[:] = tokens.reshape(here.shape)
    grid = torch.from_numpy(tokens).to(state.canvas.device)  # (N, n_t, D)
    return replace(state, tokens=flat, grids=(*state.grids, grid), canvas=tokenizer.write(t, state.canvas, grid))


def require_applicable(output: RewardOutput, scenes: Sequence[Scene]) -> None:
    """``ValueError`` naming the first prompt to which the reward is not applicable: an episode needs a score."""
    for row in np.flatnonzero(~output.applicable).tolist():
        raise ValueError(
            f"the reward is not applicable to row {row}, {scenes[row].prompt!r}, and an episode needs a score: "
            "give prompts that it applies to, or combine it with a reward that applies to all"
        )


def decode(tokenizer: VisualTokenizer, state: State) -> np.ndarray:
    """The images of all grids so far, ``(N, S, S, 3)`` uint8."""
    return tokenizer.decode(state.canvas).cpu().numpy()


def finish(tokenizer: VisualTokenizer, reward: Reward, state: State) -> State:
    """Decode the images and score them: the state with its outcome. The reward checks that scores are finite."""
    images = decode(tokenizer, state)
    return conclude(state, images, reward(images, state.scenes))


def conclude(state: State, images: np.ndarray, output: RewardOutput) -> State:
    """The state with its outcome: the decoded images ``(N, S, S, 3)`` and what the reward found in them."""
    require_applicable(output, state.scenes)
    outcome = {
        "image": images,
        "score": output.scores,
        "parts": dict(output.parts),
        "words_read": output.words,
        "reads": np.full(len(images), output.reads_words),
        "confidences": output.confidences,
        "regions": output.regions,
        "components": output.components,
        "boxes": [np.array(scene.boxes, np.float32).reshape(-1, 4) for scene in state.scenes],
    }
    return replace(state, outcome=outcome)


def fork(state: State, k: int) -> State:
    """k copies of every row, those of row i at ``i * k .. i * k + k - 1``."""
    index = np.repeat(np.arange(len(state.scenes)), k)
    rows = torch.from_numpy(index).to(state.canvas.device)
    return State(
        scenes=tuple(state.scenes[i] for i in index),
        prompts=state.prompts[index],
        tokens=state.tokens[index],
        grids=tuple(grid[rows] for grid in state.grids),
        canvas=state.canvas[rows],
        outcome=None if state.outcome is None else _take(state.outcome, index),
    )


def _take(value: Any, index: np.ndarray) -> Any:
    """Rows of an array, of a list, or of every value of a dict."""
    if isinstance(value, dict):
        return {key: _take(part, index) for key, part in value.items()}
    return value[index] if isinstance(value, np.ndarray) else [value[i] for i in index]


# What the environments show ------------------------------------------------------------------------------------------


def observe(state: State) -> dict[str, np.ndarray]:
    """The observation of N rows, in fresh arrays: tokens ``(N, L)`` or ``(N, L, D)``, scale ``(N,)``, prompt
    ``(N, bytes)``."""
    return {
        "tokens": state.tokens.copy(),
        "scale": np.full(len(state.scenes), state.t, np.int64),
        "prompt": state.prompts.copy(),
    }


def prompt_info(state: State) -> dict[str, Any]:
    """The info of a reset, one entry a row: the prompts and their target words."""
    return {
        "prompt": [scene.prompt for scene in state.scenes],
        "words": [list(scene.words) for scene in state.scenes],
    }


def row_of(info: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of a batched info or observation, with Python numbers.

    Where rows differ in length (regions, boxes) the row comes as a list of boxes, because Gymnasium's vector
    environments stack the arrays that they find in an info.
    """
    return {
        key: row_of(value, row) if isinstance(value, Mapping) else _entry(value, row) for key, value in info.items()
    }


def _entry(values: Any, row: int) -> Any:
    value = values[row]
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(values, list) and isinstance(value, np.ndarray) else value


def observation_space(tokenizer: VisualTokenizer, limit: int = MAX_PROMPT_BYTES) -> spaces.Dict:
    """One row's observation: the tokens so far (-1: not yet), the scale to come, the prompt's bytes."""
    schedule = tokenizer.schedule
    return spaces.Dict(
        tokens=spaces.Box(-1, tokenizer.vocab_size - 1, (schedule.total_tokens, *code_shape(tokenizer)), np.int64),
        scale=spaces.Discrete(len(schedule) + 1),
        prompt=spaces.Box(0, 255, (limit,), np.uint8),
    )


def action_space(tokenizer: VisualTokenizer) -> spaces.MultiDiscrete:
    """One row's action: the canvas ``(H, W)`` of tokens, ``(H, W, D)`` when they have several codes.

    In a raster schedule no grid is larger than one token, and the action is ``(1, 1)``.
    """
    return spaces.MultiDiscrete(np.full((*tokenizer.schedule.grids[-1], *code_shape(tokenizer)), tokenizer.vocab_size))


# What the environments are made of -----------------------------------------------------------------------------------


def components(
    split: str,
    regions: Mapping[Any, float] | str | None,
    size: int | None,
    reward: str | Reward,
    reward_kwargs: Mapping[str, Any] | None,
    tokenizer: str | Path | VisualTokenizer | None,
    world: str | World | None,
    prompts: str | Path | None = None,
) -> tuple[World, VisualTokenizer, Reward]:
    """The world, the tokenizer and the reward that an environment's arguments name; objects are taken as they are."""
    if world is not None and prompts is not None:
        raise ValueError(f"give world or prompts, not both: got {world!r} and {prompts!r}")
    name = world if isinstance(world, str) else SMALL
    if prompts is not None:
        world = PromptWorld(prompts, size=64 if size is None else size, split=split, regions=regions)
    elif world is None or isinstance(world, str):
        world = make_world(name, split, regions, size)
    else:
        check_world(world)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(shipped_tokenizer(name) if tokenizer is None else tokenizer)
    if tokenizer.image_size != world.size:
        raise ValueError(
            f"the tokenizer draws images of {tokenizer.image_size} px and the world has {world.size} px: "
            f"set size={tokenizer.image_size}, or tokenizer= to one that was trained at {world.size} px"
        )
    if isinstance(reward, str):
        import rewards  # here, so that a world without OCR runs where no OCR is installed

        return world, tokenizer, rewards.make(reward, **(reward_kwargs or {}))
    if not callable(reward) or reward_kwargs:
        raise ValueError(f"reward must be a name (with reward_kwargs) or a Reward (without), got {reward!r}")
    return world, tokenizer, reward


def check_world(world: Any) -> None:
    """``ValueError`` naming what an object lacks that environments ask of a world."""
    wanted = {"size": "pixels", "max_prompt_bytes": "bytes of the longest prompt", "sample": "sample(rng) -> Scene"}
    for name, meaning in wanted.items():
        value = getattr(world, name, None)
        right = callable(value) if name == "sample" else isinstance(value, int | np.integer)
        if isinstance(world, type) or not right:
            raise ValueError(f"a world needs {', '.join(wanted)}; {world!r} has no {name} ({meaning})")


def requested_scenes(
    options: Mapping[str, Any] | None,
    batch: int | None,
    size: int,
    limit: int = MAX_PROMPT_BYTES,
    world: Any = None,
) -> list[Scene] | None:
    """The scenes that the options of a reset ask for, or ``None`` when the world is to draw them.

    Args:
        options: ``{"prompt": str}`` or ``{"scene": Scene}``; with ``batch``, ``{"prompts": [...]}`` or
            ``{"scenes": [...]}``, one entry a row.
        world: warns of prompts that are unlike its own, see ``unfamiliar.py``.

    Raises:
        ValueError: an unknown option, both at once, entries of another type or number, a prompt without quoted words.
    """
    prompt_key, scene_key = ("prompt", "scene") if batch is None else ("prompts", "scenes")
    options = options or {}
    unknown = [name for name in options if name not in (prompt_key, scene_key)]
    if unknown:
        raise ValueError(f"unknown reset option {unknown[0]!r}: choose {prompt_key!r} or {scene_key!r}")
    if len(options) == 2:
        raise ValueError(f"give the reset option {prompt_key!r} or {scene_key!r}, not both")
    if not options:
        return None
    ((name, value),) = options.items()
    values = [value] if batch is None else list(value)
    wanted = str if name == prompt_key else Scene
    wrong = [entry for entry in values if not isinstance(entry, wanted)]
    if wrong:
        raise ValueError(f"the reset option {name!r} takes {wanted.__name__}, got {wrong[0]!r}")
    if len(values) != (batch or 1):
        raise ValueError(f"the reset option {name!r} needs one entry a row, {batch}; got {len(values)}")
    if name == scene_key:
        return values
    scenes = [scene_from_prompt(entry, size, limit) for entry in values]
    for entry in values:
        warn_of_prompt(entry, world)
    return scenes


def reject(owner: str, unknown: Mapping[str, Any], known: Collection[str]) -> None:
    """``TypeError`` naming the first keyword argument that the environment does not have, and those it has."""
    for name, value in unknown.items():
        raise TypeError(f"{owner} has no option {name}={value!r}: choose from {', '.join(known)}")
