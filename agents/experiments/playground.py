"""What the playground of ``vartext play --web`` does, without the web: images that grow grid by grid and can go back.

A `Drawing` keeps the environment's state before each grid (``clone_state``). So it can be redrawn from any scale on
(``restore_state``), take a grid by hand, or be finished several times from there (``fork``), as VMR's middle return
is. Where people speak of a grid, a row stands for a raster's tokens, see `ScaleSchedule.bands`.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agents.experiments.loading import make_env, policy_at
from agents.policies import SHIPPED
from agents.policies.base import Policy
from agents.rollout import Caches, resized, unroll
from agents.sampling import Decoding
from agents.vmr import middle_return
from rewards.base import Reward, RewardOutput
from var_env.env import EpisodeState
from var_env.scenes import scene_from_prompt
from var_env.seeding import as_seed
from var_env.unfamiliar import unfamiliar
from var_env.vector import VARTextVectorEnv

TILE = 16  # px, the side of a code's tile
COLUMNS = 32  # tiles in a row of the sheet
MOST_CODES, MOST_PIXELS = 1024, 128  # tokenizers beyond take too long to show each code
ETA = 1.0  # of the middle return; VMR's default


@dataclass(frozen=True)
class Limits:
    """What one page, and all of them together, may ask for."""

    prompt_bytes: int = 512  # a policy's own limit is often lower
    suffixes: int = 8  # images that one request draws
    at_once: int = 1  # requests that are drawn at a time; the others wait
    waiting: int = 16  # requests that may wait
    sessions: int = 64  # pages that are remembered; the one that was used least recently goes first
    body_bytes: int = 2**16


class Frame(NamedTuple):
    """An image after some of its grids, and what the reward found in it."""

    name: str  # of the last grid, such as "4x4"
    image: np.ndarray  # (S, S, 3) uint8
    tokens: list[int]  # of the last grid, n_t; empty where a token has several codes
    words: list[str]  # as OCR read them
    boxes: np.ndarray  # (n, 4) xyxy in pixels, where text was found
    score: float | None  # of this image; that of the last grid is the reward. None where it is not applicable
    parts: dict[str, float | None]
    asked: list[tuple[str, float, np.ndarray]]  # the score's components: name, value, boxes (n, 4)


class Player:
    """A policy that draws, with an environment of its own.

    Args:
        policy: on its device.
        reward: reads and scores the images; players may share it.
    """

    def __init__(self, policy: Policy, reward: Reward) -> None:
        self.policy = policy
        self.envs = make_env(policy, reward=reward)
        self.bands = [(name.split("_", 1)[1], steps) for name, steps in policy.schedule.bands]
        if policy.schedule.is_raster:
            self.bands = [(f"row {name}", steps) for name, steps in self.bands]

    def start(self, prompt: str, limit: int) -> VARTextVectorEnv:
        """An episode of one row with this prompt.

        Raises:
            ValueError: the prompt has more than ``limit`` bytes or than the policy reads, or no word in quotes.
        """
        if not prompt.strip():
            raise ValueError(
                'the prompt is empty: write one with a word in double quotes, such as A sign that says "RUN"'
            )
        envs = resized(self.envs, 1)
        longest = min(limit, envs.world.max_prompt_bytes)
        scene = scene_from_prompt(prompt, envs.world.size, longest)
        self.policy.encode_prompts([prompt])  # a policy may have limits of its own
        envs.reset(options={"scenes": [scene]})
        return envs

    def notes(self, prompt: str) -> list[str]:
        """What the prompt asks for that the policy can hardly write; nothing where its training is not known."""
        world = self.policy.trained_on()
        if world is None:
            return []
        return unfamiliar(prompt, world.size, world.max_letters, max(world.regions))


class Drawing:
    """One image that a policy draws, and the way back to each of its grids.

    Attributes:
        frames: one a grid that is drawn, from coarse to fine.

    Args:
        player: draws it.
        prompt: with words in double quotes.
        decoding: how tokens are drawn.
        seed: of the sampler, 0 to 2**64 - 1. The same image as ``vartext play --seed`` gives.
        limits: of the prompt and of the suffixes.

    Raises:
        ValueError: as in `Player.start`, or a seed out of its range.
    """

    def __init__(
        self, player: Player, prompt: str, decoding: Decoding, seed: int, limits: Limits | None = None
    ) -> None:
        self.player, self.limits = player, limits or Limits()
        self.envs = player.start(prompt, self.limits.prompt_bytes)
        self.states: list[EpisodeState] = [self.envs.clone_state()]  # before each grid, and after the last one
        self.frames: list[Frame] = []
        self.decode_with(decoding, seed)

    def decode_with(self, decoding: Decoding, seed: int) -> None:
        """Draw what is to come in another way."""
        self.decoding = decoding
        self.generator = torch.Generator(self.player.policy.device).manual_seed(as_seed(seed))
        self.caches: Caches | None = None

    @property
    def finished(self) -> bool:
        return len(self.frames) == len(self.player.bands)

    def sample(self) -> Frame:
        """Let the policy draw the next grid. ``ValueError`` when the image is finished."""
        if self.finished:
            raise ValueError("the image is finished: draw a new one, or go back to one of its grids")
        name, steps = self.player.bands[len(self.frames)]
        if self.caches is None:
            self.caches = caches_of(self.player.policy, self.envs, self.decoding.guided)
        trail = unroll(self.player.policy, self.envs, self.caches, steps, self.decoding, self.generator)
        return self._drawn(name, steps, None if trail.answer is None else trail.answer.result())

    def write(self, band: int, tokens: Sequence[int]) -> Frame:
        """Give a grid by hand. Those after it are forgotten.

        Args:
            band: which grid, from 0.
            tokens: the grid's, in reading order.

        Raises:
            ValueError: a grid that cannot be given yet, another number of tokens, or one outside of the vocabulary.
        """
        self._require(band)
        tokenizer, (name, steps) = self.envs.tokenizer, self.player.bands[band]
        if tokenizer.depth > 1:
            raise ValueError(f"a token of this policy has {tokenizer.depth} codes, so no grid can be given by hand")
        counts = [tokenizer.schedule.sizes[t] for t in steps]
        if len(tokens) != sum(counts):
            raise ValueError(f"the grid {name} has {sum(counts)} tokens, got {len(tokens)}")
        for token in tokens:
            if not 0 <= token < tokenizer.vocab_size:
                raise ValueError(f"there is no token {token}: use 0 to {tokenizer.vocab_size - 1}")
        self.back_to(band)
        for grid in torch.tensor(tokens, dtype=torch.int64).split(counts):
            self.envs.step(grid[None])  # (1, n_t)
        return self._drawn(name, steps, None)

    def back_to(self, band: int) -> None:
        """Forget this grid and all after it; ``band`` counts from 0. ``ValueError`` for one that is not drawn yet."""
        self._require(band)
        self.envs.restore_state(self.states[band])
        del self.states[band + 1 :], self.frames[band:]
        self.caches = None

    def suffixes(self, band: int, count: int, decoding: Decoding, seed: int) -> tuple[list[Frame], float]:
        """Finish the image several times from this grid on, which stays as it is itself.

        Args:
            band: the first grid to be drawn anew, from 0.
            count: K, the number of suffixes, at most that of the limits.
            decoding, seed: as in the constructor.

        Returns:
            The K finished images, and the middle return of what they share (eq. 10, with eta 1).

        Raises:
            ValueError: a grid that is not drawn yet, or too many images.
        """
        self._require(band)
        if not 1 <= count <= self.limits.suffixes:
            raise ValueError(f"from 1 to {self.limits.suffixes} images can be drawn at a time, got {count}")
        policy, trunk = self.player.policy, resized(self.envs, 1)
        trunk.restore_state(self.states[band])
        envs = trunk.fork(count)
        generator = torch.Generator(policy.device).manual_seed(as_seed(seed))
        steps = range(trunk.t, len(trunk.schedule))
        trail = unroll(policy, envs, caches_of(policy, envs, decoding.guided), steps, decoding, generator)
        assert trail.answer is not None and trail.images is not None  # all grids were drawn
        found = trail.answer.result()
        frames = [self._frame(self.player.bands[-1], envs, trail.images, found, row) for row in range(count)]
        return frames, middle_return(torch.as_tensor(found.scores).double(), ETA).item()

    def codes(self, band: int) -> tuple[np.ndarray, int, int]:
        """What each code would look like in a grid, on the canvas of the grids before it.

        Returns:
            A sheet of V square tiles in reading order, uint8; the tiles in a row; and a tile's side in pixels. A tile
            is cut from the middle of an image whose grid has this code everywhere.

        Raises:
            ValueError: a grid that is not drawn yet, or a tokenizer that has too many codes, or several a token.
        """
        self._require(band)
        tokenizer = self.envs.tokenizer
        if tokenizer.depth > 1 or tokenizer.vocab_size > MOST_CODES or tokenizer.image_size > MOST_PIXELS:
            raise ValueError(
                f"grids are drawn by hand with a tokenizer of one code a token, at most {MOST_CODES} codes and images "
                f"of at most {MOST_PIXELS} px; this one has {tokenizer.depth}, {tokenizer.vocab_size} and "
                f"{tokenizer.image_size} px"
            )
        episode, steps = self.states[band].episode, self.player.bands[band][1]
        assert episode is not None
        tiles = [
            tile
            for codes in torch.arange(tokenizer.vocab_size).split(128)
            for tile in code_tiles(self.player.policy, episode.canvas, steps, codes)
        ]
        sheet = np.zeros((-(-len(tiles) // COLUMNS) * TILE, COLUMNS * TILE, 3), np.uint8)
        for code, tile in enumerate(tiles):
            y, x = code // COLUMNS * TILE, code % COLUMNS * TILE
            sheet[y : y + TILE, x : x + TILE] = tile
        return sheet, COLUMNS, TILE

    def _require(self, band: int) -> None:
        if not 0 <= band < min(len(self.states), len(self.player.bands)):
            raise ValueError(f"grid {band + 1} cannot be drawn yet: {len(self.frames)} of them are there")

    def _drawn(self, name: str, steps: range, found: RewardOutput | None) -> Frame:
        """The frame of the grid that was just drawn, read if the environment has not done so."""
        images = self.envs.decode()
        frame = self._frame((name, steps), self.envs, images, found or self.envs.reward(images, self.envs.scenes), 0)
        self.states.append(self.envs.clone_state())
        self.frames.append(frame)
        return frame

    @staticmethod
    def _frame(
        band: tuple[str, range], envs: VARTextVectorEnv, images: np.ndarray, found: RewardOutput, row: int
    ) -> Frame:
        name, steps = band
        single = envs.tokenizer.depth == 1
        return Frame(
            name,
            images[row],
            [token for t in steps for token in envs.grids[t][row, :, 0].tolist()] if single else [],
            found.words[row],
            found.regions[row],
            _number(found.scores[row]),
            {part: _number(values[row]) for part, values in found.parts.items()},
            [
                (" ".join([part.kind, *(str(i + 1) for i in part.indices)]), part.value, _boxes(part.boxes))
                for part in found.components[row]
            ],
        )


@torch.no_grad()
def caches_of(policy: Policy, envs: VARTextVectorEnv, guided: bool) -> Caches:
    """The policy's caches of episodes that stand before grid ``envs.t``, as if it had drawn the grids itself."""
    caches = Caches(policy, policy.encode_prompts([scene.prompt for scene in envs.scenes]), guided)
    grids = [grid.to(policy.device) for grid in envs.grids]
    if grids:
        features = envs.tokenizer.read_all(grids, len(grids) - 1, envs.num_envs)
        for t, seen in enumerate(features):
            caches.step(t, seen.to(policy.device), grids[t - 1] if t else None)
    return caches


@torch.no_grad()
def code_tiles(policy: Policy, canvas: Tensor, steps: range, codes: Tensor) -> list[np.ndarray]:
    """For each of the codes ``(n,)`` what it shows where all of the grid has it, ``(TILE, TILE, 3)`` uint8."""
    tokenizer = policy.tokenizer
    rows = canvas.expand(len(codes), *canvas.shape[1:])
    for t in steps:
        grid = codes.to(canvas.device)[:, None, None].expand(-1, tokenizer.schedule.sizes[t], 1)  # (n, n_t, 1)
        rows = tokenizer.write(t, rows, grid)
    images = tokenizer.decode(rows).cpu().numpy()  # (n, S, S, 3)
    raster = tokenizer.schedule.is_raster
    height, width = tokenizer.schedule.canvas if raster else tokenizer.schedule.grids[steps[0]]
    size = tokenizer.image_size
    row = steps[0] // width if raster else height // 2
    top, left = row * size // height, width // 2 * size // width
    cut = images[:, top : top + size // height, left : left + size // width]
    return [np.asarray(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BOX)) for tile in cut]


@dataclass
class Session:
    """What one page has drawn; one request at a time may change it."""

    drawings: dict[int, Drawing] = field(default_factory=dict)  # by side, 0 or 1
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drawing(self, side: int) -> Drawing:
        """``ValueError`` when nothing was drawn on this side."""
        if side not in self.drawings:
            raise ValueError("nothing is drawn here yet: draw an image first")
        return self.drawings[side]


class Sessions:
    """The pages that are open, each with drawings of its own.

    Args:
        most: of these; the one that was used least recently is forgotten.
    """

    def __init__(self, most: int) -> None:
        self.most, self.open_ones, self.lock = most, OrderedDict[str, Session](), threading.Lock()

    def open(self) -> str:
        """A new session's name, which cannot be guessed."""
        name = secrets.token_urlsafe(16)
        with self.lock:
            self.open_ones[name] = Session()
            while len(self.open_ones) > self.most:
                self.open_ones.popitem(last=False)
        return name

    def get(self, name: str) -> Session:
        """``KeyError`` with a message for people when it is not open, or no longer."""
        with self.lock:
            if name not in self.open_ones:
                raise KeyError("this page's drawings are gone, because others were used since: reload the page")
            self.open_ones.move_to_end(name)
            return self.open_ones[name]


class Players:
    """The policies to choose from, by name, read when they are first asked for.

    Only these can be chosen, because reading an agent's zip may run code.

    Args:
        given: those that the command names, in front of the shipped ones; by the name that the page shows.
        reward: of all of them.
        device: as in Stable-Baselines3.
    """

    def __init__(self, given: Mapping[str, Player], reward: Reward, device: str = "auto") -> None:
        self.names = [*given, *(name for name in SHIPPED if name not in given)]
        self.reward, self.device, self.lock = reward, device, threading.Lock()
        self.loaded = dict(given)

    def get(self, name: str) -> Player:
        """``ValueError`` for a name that is not among `names`."""
        if name not in self.names:
            raise ValueError(f"there is no policy {name!r} here: choose of {', '.join(self.names)}")
        with self.lock:
            if name not in self.loaded:
                self.loaded[name] = Player(policy_at(Path(name), device=self.device), self.reward)
            return self.loaded[name]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _boxes(boxes: np.ndarray | None) -> np.ndarray:
    return np.zeros((0, 4), np.float32) if boxes is None else boxes
