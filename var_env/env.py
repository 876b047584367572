"""``VARText-v0``: draw an image of given words, one token grid a step, for the score of an OCR model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np

from var_env import mdp, rendering
from var_env.scenes import Scene, World
from var_env.schedule import ScaleSchedule
from var_env.seeding import as_seed
from var_env.tokenizers.base import VisualTokenizer

if TYPE_CHECKING:
    from rewards.base import Reward

RENDER_MODES = ["rgb_array", "ansi"]
OPTIONS = ("split", "regions", "size", "prompts", "reward", "reward_kwargs", "tokenizer", "world", "render_mode")


class EpisodeState(NamedTuple):
    """What :meth:`VARTextEnv.clone_state` returns: the episode and the random generators. Opaque to its holder."""

    episode: mdp.State | None
    generators: list[np.random.Generator]
    seeds: list[int | None]


class VARTextEnv(gym.Env[dict[str, Any], np.ndarray]):
    """Text rendering by next-scale prediction, as a Gymnasium environment.

    An episode has exactly T steps, one a token grid, coarse to fine; the shipped world has T = 6 grids of 1x1, 2x2,
    3x3, 4x4, 6x6 and 8x8 tokens. The reward is 0 until the last step and then the score of the decoded image.

    **Action space**: ``MultiDiscrete`` of shape ``(H, W)``, the last grid's, each entry in ``0..V-1``. At scale t
    only its top-left ``h_t x w_t`` corner counts; :meth:`step` takes that exact grid as well. With a bitwise tokenizer
    a token has D codes, and actions and tokens have a last axis of D.

    **Observation space**: ``Dict`` of ``tokens``, int64 ``(L,)``, all grids one after the other, -1 where nothing was
    sampled yet; ``scale``, 0 to T, the grid to be given next; ``prompt``, its UTF-8 bytes padded with zeros, uint8.

    **Info**: after a reset, ``prompt`` and ``words`` (the targets). At the end, ``image`` (uint8 ``(S, S, 3)``),
    ``score``, ``parts`` (the score's terms by name), ``words_read`` with ``confidences`` in [0, 1], ``reads`` (whether
    the reward looks for words, or there are none because nobody looked), ``regions`` (a list of boxes x0 y0 x1 y1 in
    pixels, float32 ``(4,)``, where text was found), ``components`` (a list of
    :class:`~rewards.components.Component`, the score's parts with their places, empty when the reward gives none) and
    ``boxes`` (the same for the target words, empty when the episode
    was started from a prompt).

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``: the words that prompts are drawn from.
        regions: number of words an image, as a mapping from a count to its probability; keys may be strings,
            as JSON has them. ``"target"`` is the paper's profile of two to five, for images of 128 pixels. The
            default is that of :class:`~var_env.scenes.World`.
        size: height and width of the image in pixels; by default 64, or that of the world that is named.
        prompts: draws the scenes from prompt files in place of the rendered world: a file, a folder or a Hugging Face
            dataset's name, such as ``"dnkdnk/CVTG-2K"``; see :class:`~var_env.prompts.PromptWorld`, which takes
            ``split``, ``regions`` and ``size`` too. Observed prompts are longer then.
        reward: a name that ``rewards.make`` knows, or a ``rewards.base.Reward``.
        reward_kwargs: options of the named reward.
        tokenizer: path of a tokenizer's weights (default: the world's shipped ones), or a :class:`VisualTokenizer`.
        world: the name of a rendered world, ``"small"`` (the default) or ``"room"``, see ``var_env/worlds.py``; or a
            :class:`World` that replaces ``split``, ``regions``, ``size`` and ``prompts``.
        render_mode: ``"rgb_array"``, ``"ansi"`` or ``None``.

    With ``gymnasium.make`` use names, numbers and dicts only, so that the environment's spec survives JSON.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option out of its range; a reward's score that is not finite, from :meth:`step`.
        ResetNeeded: a step before the first reset or after the end.

    Examples:
        >>> env = gym.make("VARText-v0", split="val")  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 2}

    def __init__(
        self,
        *,
        split: str = "train",
        regions: Mapping[Any, float] | str | None = None,
        size: int | None = None,
        prompts: str | Path | None = None,
        reward: str | Reward = "ocr",
        reward_kwargs: Mapping[str, Any] | None = None,
        tokenizer: str | Path | VisualTokenizer | None = None,
        world: str | World | None = None,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        mdp.reject("VARTextEnv", unknown, OPTIONS)
        check_render_mode(render_mode)
        self.world, self.tokenizer, self.reward = mdp.components(
            split, regions, size, reward, reward_kwargs, tokenizer, world, prompts
        )
        self.render_mode = render_mode
        self.observation_space = mdp.observation_space(self.tokenizer, self.world.max_prompt_bytes)
        self.action_space = mdp.action_space(self.tokenizer)
        self._state: mdp.State | None = None

    @property
    def schedule(self) -> ScaleSchedule:
        return self.tokenizer.schedule

    @property
    def scene(self) -> Scene:
        """The scene of this episode."""
        return mdp.require(self._state).scenes[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode with a scene of the world, or the one that the options ask for.

        Args:
            seed: seeds ``np_random``, from which the world draws, 0 to 2**64 - 1; without it, the generator goes on.
            options: ``{"prompt": str}``, words in double quotes, or ``{"scene": Scene}``. Draws no random number.
                A prompt unlike the world's gets a :class:`~var_env.unfamiliar.PromptWarning`, once.
        """
        scenes = mdp.requested_scenes(options, None, self.world.size, self.world.max_prompt_bytes, self.world)
        requested = None if scenes is None else self._start(scenes)
        super().reset(seed=None if seed is None else as_seed(seed))
        self._state = requested or self._start([self.world.sample(self.np_random)])
        return self._observation(self._state), mdp.row_of(mdp.prompt_info(self._state), 0)

    def _start(self, scenes: list[Scene]) -> mdp.State:
        return mdp.start(self.tokenizer, scenes, self.world.max_prompt_bytes)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Append one grid: integers of shape ``(H, W)``, the canvas, or ``(h_t, w_t)``. Never truncates."""
        self._state = state = mdp.step(self.tokenizer, self.reward, self._state, action, batched=False)
        if state.outcome is None:
            return self._observation(state), 0.0, False, False, {}
        info = mdp.row_of(state.outcome, 0)
        return self._observation(state), info["score"], True, False, info

    def _observation(self, state: mdp.State) -> dict[str, Any]:
        return {key: batch[0] for key, batch in mdp.observe(state).items()}

    def render(self) -> Any:
        """``"rgb_array"``: the image beside the grids, uint8 ``(h, w, 3)``. ``"ansi"``: the same as text."""
        return render_row(self.render_mode, self.tokenizer, self._state, 0)

    def clone_state(self) -> EpisodeState:
        """The whole state, random generator included, to go back to with :meth:`restore_state`, here or elsewhere."""
        return EpisodeState(self._state, [deepcopy(self.np_random)], [self.np_random_seed])

    def restore_state(self, state: EpisodeState) -> None:
        """Go back to a cloned state. It can be restored any number of times."""
        check_clone(state, 1, self.tokenizer)
        self._state = state.episode
        self._np_random, self._np_random_seed = deepcopy(state.generators[0]), state.seeds[0]


def check_render_mode(render_mode: str | None) -> None:
    """``ValueError`` for a render mode that does not exist."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"unknown render_mode {render_mode!r}: choose from {', '.join(RENDER_MODES)} or None")


def render_row(render_mode: str | None, tokenizer: VisualTokenizer, state: mdp.State | None, row: int) -> Any:
    """One row's frame in the given mode, ``None`` without a mode."""
    if render_mode is None:
        return None
    frame = rendering.rgb_frame if render_mode == "rgb_array" else rendering.text_frame
    return frame(tokenizer, mdp.require(state), row)


def check_clone(state: EpisodeState, rows: int, tokenizer: VisualTokenizer) -> None:
    """``ValueError`` for a state that comes from an environment of another batch size, schedule or depth."""
    if len(state.generators) != rows:
        raise ValueError(f"this state holds {len(state.generators)} episodes, the environment has {rows}")
    if state.episode is None:
        return
    (_, tokens, *code), expected = state.episode.tokens.shape, tokenizer.schedule.total_tokens
    if (tokens, *code) != (expected, *mdp.code_shape(tokenizer)):
        raise ValueError(
            f"this state's grids have {tokens} tokens of {math.prod(code)} codes, the environment's tokenizer has "
            f"{expected} of {tokenizer.depth}"
        )
