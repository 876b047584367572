"""N episodes of ``VARText-v0`` in lockstep: one tokenizer call a step and one reward call an episode for all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from var_env import mdp
from var_env.env import OPTIONS, RENDER_MODES, EpisodeState, check_clone, check_render_mode, render_row
from var_env.scenes import Scene, World
from var_env.schedule import ScaleSchedule
from var_env.seeding import as_seed
from var_env.tokenizers.base import VisualTokenizer

if TYPE_CHECKING:
    from rewards.base import Reward, RewardOutput


class VARTextVectorEnv(VectorEnv[dict[str, np.ndarray], Any, np.ndarray]):
    """A batch of ``num_envs`` episodes that start, step and end together.

    Row i of ``reset(seed=s)`` is the episode of a single :class:`~var_env.env.VARTextEnv` with seed ``s + i``. There is
    no autoreset: every row ends at step T, and the next call is :meth:`reset`.

    The spaces are the single environment's, batched. An action is the canvas ``(N, H, W)``, the exact grid
    ``(N, h_t, w_t)``, or the flat grid as policies give it, ``(N, n_t)`` or ``(N, n_t, 1)``; arrays or tensors. The
    infos hold what the single environment's do, one entry a row: ``image`` ``(N, S, S, 3)``, ``score`` ``(N,)``, each
    of ``parts`` ``(N,)``, and lists of length N for the rest, with ``regions`` and ``boxes`` as arrays ``(n, 4)``.

    Args:
        num_envs: N, the number of rows.
        split, regions, size, prompts, reward, reward_kwargs, tokenizer, world, render_mode: as in the single
            environment.

    Raises:
        TypeError, ValueError, ResetNeeded: as in the single environment.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 2, "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        num_envs: int = 1,
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
        mdp.reject("VARTextVectorEnv", unknown, ("num_envs", *OPTIONS))
        check_render_mode(render_mode)
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.world, self.tokenizer, self.reward = mdp.components(
            split, regions, size, reward, reward_kwargs, tokenizer, world, prompts
        )
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = mdp.observation_space(self.tokenizer, self.world.max_prompt_bytes)
        self.single_action_space = mdp.action_space(self.tokenizer)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: mdp.State | None = None
        self._generators: list[np.random.Generator] = []
        self._seeds: list[int | None] = [None] * num_envs

    # What agents read ------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> ScaleSchedule:
        return self.tokenizer.schedule

    @property
    def t(self) -> int:
        """The scale to be given next, 0 to T."""
        return mdp.require(self._state).t

    @property
    def scenes(self) -> list[Scene]:
        """The N scenes of this episode."""
        return list(mdp.require(self._state).scenes)

    @property
    def grids(self) -> list[Tensor]:
        """The grids so far, each int64 ``(N, n_t, D)`` on the tokenizer's device. Not to be changed in place."""
        return list(mdp.require(self._state).grids)

    @property
    def canvas(self) -> Tensor:
        """The tokenizer's canvas, N rows. Not to be changed in place."""
        return mdp.require(self._state).canvas

    @property
    def outcome(self) -> Mapping[str, Any] | None:
        """The info of the last step, one entry a row, once the episodes are over; before, ``None``."""
        return mdp.require(self._state).outcome

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """One generator a row, seeded by the system when :meth:`reset` has not done it."""
        self._seed(None)
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The seed of each row's generator."""
        self._seed(None)
        return tuple(self._seeds)

    def set_random_states(self, states: Sequence[Mapping[str, Any]], seeds: Sequence[int | None]) -> None:
        """Set each row's generator to a state that ``np_random[i].bit_generator.state`` gave, and the seed it had.

        ``ValueError`` unless there is one a row.
        """
        if not len(states) == len(seeds) == self.num_envs:
            raise ValueError(f"need {self.num_envs} states and seeds, one a row; got {len(states)} and {len(seeds)}")
        self._generators, self._seeds = [seeding.np_random(0)[0] for _ in states], list(seeds)
        for generator, state in zip(self._generators, states, strict=True):
            generator.bit_generator.state = dict(state)

    # The environment -------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start N episodes.

        Args:
            seed: s seeds row i with ``s + i``; a sequence gives each row its own. Without it every row's generator
                goes on.
            options: ``{"prompts": [str] * N}`` or ``{"scenes": [Scene] * N}``; no random number is drawn then.
                ``reset_mask``, Gymnasium's choice of rows, must name all of them.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is not None and not (np.shape(mask) == (self.num_envs,) and np.all(mask)):
            raise ValueError(f"reset_mask must be true for all {self.num_envs} rows: they run in lockstep")
        requested = mdp.requested_scenes(
            options, self.num_envs, self.world.size, self.world.max_prompt_bytes, self.world
        )
        state = None if requested is None else self._start(requested)
        self._seed(seed)
        self._state = state or self._start([self.world.sample(rng) for rng in self._generators])
        return mdp.observe(self._state), mdp.prompt_info(self._state)

    def _start(self, scenes: list[Scene]) -> mdp.State:
        return mdp.start(self.tokenizer, scenes, self.world.max_prompt_bytes)

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Give a new generator to each row that has a seed or no generator yet."""
        if seed is None:
            seeds: list[int | None] = [None] * self.num_envs
        elif isinstance(seed, Sequence) or np.ndim(seed):
            seeds = [None if s is None else as_seed(s, f"seed of row {i}") for i, s in enumerate(seed)]  # type: ignore[arg-type]
        else:
            first = as_seed(seed)
            seeds = [first + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed must be one integer or one a row, {self.num_envs}; got {len(seeds)}")
        rows: list[tuple[np.random.Generator, int | None]]
        if self._generators:
            kept = zip(self._generators, self._seeds, strict=True)
            rows = [row if s is None else seeding.np_random(s) for s, row in zip(seeds, kept, strict=True)]
        else:
            rows = [seeding.np_random(s) for s in seeds]
        self._generators, self._seeds = [rng for rng, _ in rows], [s for _, s in rows]

    def step(self, actions: Any) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one grid to every row; see the class for the shapes. All rows end at step T, none is truncated."""
        self._state = state = mdp.step(self.tokenizer, self.reward, self._state, actions, batched=True)
        over = state.outcome is not None
        rewards = np.zeros(self.num_envs) if state.outcome is None else state.outcome["score"].astype(np.float64)
        terminations, truncations = np.full(self.num_envs, over), np.zeros(self.num_envs, np.bool_)
        return mdp.observe(state), rewards, terminations, truncations, dict(state.outcome or {})

    def advance(self, actions: Any) -> None:
        """Append one grid to every row as :meth:`step` does, and score nothing, for a reward that answers later."""
        self._state = mdp.advance(self.tokenizer, self._state, actions, batched=True)

    def conclude(self, images: np.ndarray, output: RewardOutput) -> None:
        """End the episodes with what the reward answered for the decoded images, ``(N, S, S, 3)``."""
        self._state = mdp.conclude(mdp.require(self._state), images, output)

    def decode(self) -> np.ndarray:
        """The images of the grids so far, ``(N, S, S, 3)`` uint8."""
        return mdp.decode(self.tokenizer, mdp.require(self._state))

    def render(self) -> tuple[Any, ...] | None:
        """One frame a row, as the single environment renders it."""
        if self.render_mode is None:
            return None
        return tuple(render_row(self.render_mode, self.tokenizer, self._state, row) for row in range(self.num_envs))

    # Branching -------------------------------------------------------------------------------------------------------

    def clone_state(self) -> EpisodeState:
        """The whole state, random generators included, to go back to with :meth:`restore_state`."""
        return EpisodeState(self._state, deepcopy(list(self.np_random)), list(self._seeds))

    def restore_state(self, state: EpisodeState) -> None:
        """Go back to a cloned state. It can be restored any number of times."""
        check_clone(state, self.num_envs, self.tokenizer)
        self._state, self._generators, self._seeds = state.episode, deepcopy(state.generators), list(state.seeds)

    def fork(self, k: int) -> VARTextVectorEnv:
        """A new environment with k copies of every row, those of row i at ``i * k .. i * k + k - 1``.

        It shares the world, the tokenizer and the reward, and nothing that changes: steps in the fork do not move this
        environment, nor the other way round. Copies of a row have copies of its random generator, so a fork that is
        reset without a seed draws the same scene k times.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"fork(k) needs an integer k of at least 1, got {k!r}")
        forked = VARTextVectorEnv(
            self.num_envs * k,
            world=self.world,
            tokenizer=self.tokenizer,
            reward=self.reward,
            render_mode=self.render_mode,
        )
        forked._state = mdp.fork(mdp.require(self._state), k)
        forked._generators = [deepcopy(rng) for rng in self._generators for _ in range(k)]
        forked._seeds = [seed for seed in self._seeds for _ in range(k)]
        return forked
