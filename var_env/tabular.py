"""``VARTabular-v0``: the process of ``VARText-v0``, so small that every image can be listed and every value computed.

A few grids over a few codes, by default 1x1, 1x2 and 2x2 over two: 7 tokens, 128 images. An image shows its tokens,
and the reward looks them up in a table. Prompts are drawn as in ``VARText-v0`` and change nothing: the paper leaves
them out of its process, too (section 3.1.2). ``agents/exact.py`` computes with the table what is best here.

Images are numbered by their tokens, read as the digits of one number, the first token the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.base import HasWords, Reward, RewardOutput
from rewards.components import Component
from rewards.old_names import keep_old_names
from var_env import mdp
from var_env.env import VARTextEnv
from var_env.scenes import World
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer
from var_env.vector import VARTextVectorEnv
from var_env.weights import load_config_and_weights, load_weights, save_module

DEFAULT_GRIDS = ((1, 1), (1, 2), (2, 2))
MOST_IMAGES = 2**16  # to be listed in a second
LEAST_SIDE = 48  # px, of World's images
OPTIONS = ("grids", "vocab_size", "reward", "seed", "render_mode")


# Images ------------------------------------------------------------------------------------------------------------


class TableTokenizer(VisualTokenizer):
    """Images that show their tokens: each cell of the last grid has a stripe a grid, in the grey of its token.

    Token a is the grey ``255 (a + 1) / V``; what is not drawn yet is black. ``encode`` reads them back, and of any
    other image gives the nearest.

    Args:
        schedule: the grids; the sides of each divide those of the last one, which is square.
        vocab_size: V, 2 to 128.
    """

    def __init__(self, schedule: ScaleSchedule, vocab_size: int = 2) -> None:
        super().__init__()
        (height, width), grids = schedule.grids[-1], schedule.grids
        if height != width or any(height % h or width % w for h, w in grids):
            raise ValueError(f"the last grid must be square, and the sides of the others divide its, got {grids}")
        if len(grids) > schedule.patch:
            raise ValueError(f"{len(grids)} stripes do not fit into cells of {schedule.patch} px: give fewer grids")
        if not 2 <= vocab_size <= 128:
            raise ValueError(f"vocab_size must be 2 to 128, got {vocab_size}")
        self.schedule, self.vocab_size, self.channels = schedule, vocab_size, len(grids)
        self.config = {"grids": [list(grid) for grid in grids], "patch": schedule.patch, "vocab_size": vocab_size}
        self.codebook: Tensor
        self.register_buffer("codebook", torch.eye(vocab_size))  # (V, V), no two codes alike

    @property
    def stripes(self) -> Tensor:
        """Which grid each pixel row of a cell shows, int64 ``(patch,)``."""
        return torch.arange(self.schedule.patch) * self.channels // self.schedule.patch

    def blank(self, batch: int) -> Tensor:
        """Zeros ``(B, T, H, W)``, a channel a grid."""
        return torch.zeros(batch, self.channels, *self.schedule.grids[-1], device=self.device)

    def write(self, t: int, canvas: Tensor, grid: Tensor) -> Tensor:
        (h, w), (height, width) = self.schedule.grids[t], self.schedule.grids[-1]
        grey = (grid.view(-1, h, w) + 1) / self.vocab_size
        written = canvas.clone()
        written[:, t] = grey.repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)
        return written

    def read(self, t: int, canvas: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(canvas, self.schedule.grids[t]).flatten(2).transpose(1, 2)

    def embed(self, t: int, grid: Tensor) -> Tensor:
        return F.embedding(grid.squeeze(-1), self.codebook)

    @torch.no_grad()
    def decode(self, canvas: Tensor) -> Tensor:
        p = self.schedule.patch
        cells = (255 * canvas).round().to(torch.uint8)[:, self.stripes]  # (B, patch, H, W)
        grey = cells.transpose(1, 2).flatten(1, 2).repeat_interleave(p, 2)  # (B, S, S)
        return grey.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        grids = []
        for t, (h, w) in enumerate(self.schedule.grids):
            row = int((self.stripes == t).nonzero()[0])  # the first one of the stripe
            grey = images[:, row :: images.shape[1] // h, :: images.shape[2] // w, 0]  # (B, h_t, w_t)
            tokens = (grey.float() * self.vocab_size / 255).round().long() - 1
            grids.append(tokens.clamp(0, self.vocab_size - 1).flatten(1).unsqueeze(-1))
        return grids

    def save(self, path: str | Path) -> None:
        save_module(self, path)

    @classmethod
    def load(cls, path: str | Path | None = None) -> TableTokenizer:
        """Read a file that :meth:`save` wrote; without a path, that of the environment's default."""
        if path is None:
            return cls(table_schedule(DEFAULT_GRIDS)).eval()
        config, weights = load_config_and_weights(path, "TableTokenizer.save")
        tokenizer = cls(ScaleSchedule(config.pop("grids"), config.pop("patch")), **config)
        load_weights(tokenizer, weights, path)
        return tokenizer.eval().requires_grad_(False)


def table_schedule(grids: Sequence[Sequence[int]]) -> ScaleSchedule:
    """The grids with a patch that gives the smallest image a `World` can have, in whole multiples of 8 pixels."""
    height = ScaleSchedule(grids).grids[-1][0]
    patch = -(-LEAST_SIDE // height)
    while patch * height % 8:
        patch += 1
    return ScaleSchedule(grids, patch=patch)


# Rewards -------------------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """What a reward is made from: all N images. Gives their scores, float64 ``(N,)``, in [0, 1]."""

    grids: list[np.ndarray]  # the tokens, T of (N, h_t, w_t)
    vocab_size: int
    rng: np.random.Generator


def smooth(all_: Tables) -> np.ndarray:
    """The share of the tokens that are those of a target, drawn from the seed."""
    right = [grid == all_.rng.integers(all_.vocab_size, size=grid.shape[1:]) for grid in all_.grids]
    return np.concatenate([part.reshape(len(part), -1) for part in right], 1).mean(1)


def copy(all_: Tables) -> np.ndarray:
    """The share of the tokens, from the second grid on, that are as the coarser token above them."""
    scores = []
    for coarse, fine in zip(all_.grids[:-1], all_.grids[1:], strict=True):
        rows, columns = (np.arange(n) * m // n for n, m in zip(fine.shape[1:], coarse.shape[1:], strict=True))
        scores.append((fine == coarse[:, rows][:, :, columns]).reshape(len(fine), -1))
    return np.concatenate(scores, 1).mean(1) if scores else np.ones(len(all_.grids[0]))


def sparse(all_: Tables) -> np.ndarray:
    """1 when the whole last grid is that of a target, drawn from the seed."""
    last = all_.grids[-1]
    return (last == all_.rng.integers(all_.vocab_size, size=last.shape[1:])).all((1, 2)).astype(np.float64)


def xor(all_: Tables) -> np.ndarray:
    """1 when the first and the last token of the last grid add up to V - 1, modulo V: with two codes, when they differ.

    Sites must agree on this and cannot, drawn independently as they are, but by settling on one of the V ways.
    """
    first, last = all_.grids[-1][:, 0, 0], all_.grids[-1][:, -1, -1]
    return ((first + last) % all_.vocab_size == all_.vocab_size - 1).astype(np.float64)


def trap(all_: Tables) -> np.ndarray:
    """The very first token chooses what the last grid is worth. 0: 0.8 of the share of its tokens that are V - 1.
    Else: 1 when its tokens add up to V - 1, modulo V.

    The second is worth more to a policy that draws the grid as a whole, and not to one that draws its sites
    independently. So it matters to the prefix which of the two will draw the suffix.
    """
    grid, code = all_.grids[-1].reshape(len(all_.grids[-1]), -1), all_.vocab_size - 1
    safe, parity = 0.8 * (grid == code).mean(1), grid.sum(1) % all_.vocab_size == code
    return np.where(all_.grids[0].reshape(len(grid), -1)[:, 0] == 0, safe, parity)


def random(all_: Tables) -> np.ndarray:
    """A number for each image, uniform in [0, 1], drawn from the seed."""
    return all_.rng.random(len(all_.grids[0]))


REWARDS: dict[str, Callable[[Tables], np.ndarray]] = {
    function.__name__: function for function in (smooth, copy, sparse, xor, trap, random)
}


def every_image(schedule: ScaleSchedule, vocab_size: int) -> np.ndarray:
    """The tokens of all images in order, int64 ``(V^L, L)``. ``ValueError`` when there are more than 65,536."""
    count = vocab_size**schedule.total_tokens
    if count > MOST_IMAGES:
        raise ValueError(
            f"{schedule.total_tokens} tokens of {vocab_size} codes make {count} images, more than the "
            f"{MOST_IMAGES} that a table may have: give fewer or smaller grids, or fewer codes"
        )
    return np.arange(count)[:, None] // digits(schedule, vocab_size) % vocab_size


def digits(schedule: ScaleSchedule, vocab_size: int) -> np.ndarray:
    """What each token counts for in the number of an image, int64 ``(L,)``."""
    return vocab_size ** np.arange(schedule.total_tokens - 1, -1, -1)


class TableReward(Reward):
    """Looks up what an image is worth.

    The regions that it reports, for Mask Propagation, are the cells of the last grid that can change an image's score.
    The words that it has read are the tokens of each grid, such as "0", "01", "0111". The components are the tokens,
    each with the cell that it covers: what a token is worth on average over all images that have it, against the
    average of all. Their sum, and a constant, is the best additive account of the table, and all of it for "smooth".

    Args:
        tokenizer: that of the images.
        name: a name in ``REWARDS``.
        seed: of what that reward draws.

    Attributes:
        table: the score of each image, float64 ``(V^L,)``.
        effects: what each token is worth, float64 ``(L, V)``.
    """

    score_range = (0.0, 1.0)

    def __init__(self, tokenizer: TableTokenizer, name: str = "smooth", seed: int = 0) -> None:
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}: choose one of {', '.join(REWARDS)}")
        self.tokenizer, self.name = tokenizer, f"table_{name}"
        schedule, codes = tokenizer.schedule, tokenizer.vocab_size
        flat = every_image(schedule, codes)  # (N, L)
        grids = [flat[:, part].reshape(-1, *grid) for part, grid in zip(schedule.slices, schedule.grids, strict=True)]
        self.table = REWARDS[name](Tables(grids, codes, np.random.default_rng(seed))).astype(np.float64)
        n = schedule.sizes[-1]
        by_site = self.table.reshape(-1, *[codes] * n)  # a site of the last grid an axis
        self.matters = np.array([(by_site != by_site.take([0], i)).any() for i in range(1, n + 1)])  # (n_T,)
        h, w = schedule.grids[-1]
        cells = np.array([(x, y, x + 1, y + 1) for y in range(h) for x in range(w)], np.float32)
        self.boxes = cells[self.matters] * schedule.patch  # (n, 4) in pixels
        means = [[self.table[flat[:, i] == code].mean() for code in range(codes)] for i in range(flat.shape[1])]
        self.effects = np.array(means) - self.table.mean()  # (L, V)
        self.places = cell_boxes(schedule)  # (L, 4) in pixels

    def score(self, images: np.ndarray, scenes: Sequence[HasWords]) -> RewardOutput:
        shown = [grid.squeeze(-1).numpy() for grid in self.tokenizer.encode(torch.from_numpy(images))]  # T of (B, n_t)
        tokens = np.concatenate(shown, 1)  # (B, L)
        number = tokens @ digits(self.tokenizer.schedule, self.tokenizer.vocab_size)  # (B,)
        words = [["".join(map(str, grid[row])) for grid in shown] for row in range(len(images))]
        return RewardOutput(
            self.table[number],
            words=words,
            confidences=[[1.0] * len(shown)] * len(images),
            regions=[self.boxes] * len(images),
            components=[self.components(row) for row in tokens],
        )

    def components(self, tokens: np.ndarray) -> list[Component]:
        """What each token of a picture, ``(L,)``, is worth, and where it is."""
        return [
            Component("token", (i,), self.effects[i, code], self.places[i : i + 1])
            for i, code in enumerate(tokens.tolist())
        ]


def cell_boxes(schedule: ScaleSchedule) -> np.ndarray:
    """The cell of the picture that each token covers, float32 ``(L, 4)``, x0 y0 x1 y1 in pixels."""
    side = schedule.canvas[0] * schedule.patch
    cells = [(x / w, y / h, (x + 1) / w, (y + 1) / h) for h, w in schedule.grids for y in range(h) for x in range(w)]
    return side * np.array(cells, np.float32)


# Environments --------------------------------------------------------------------------------------------------------


def tabular_parts(
    grids: Sequence[Sequence[int]] = DEFAULT_GRIDS, vocab_size: int = 2, reward: str = "smooth", seed: int = 0
) -> dict[str, Any]:
    """World, tokenizer and reward as keyword arguments of the environments; arguments as `VARTabularEnv`."""
    tokenizer = TableTokenizer(table_schedule(grids), vocab_size).eval()
    return {
        "world": World(size=tokenizer.image_size),
        "tokenizer": tokenizer,
        "reward": TableReward(tokenizer, reward, seed),
    }


class VARTabularEnv(VARTextEnv):
    """``VARTabular-v0``: next-scale prediction that can be solved by enumeration. Spaces and infos as `VARTextEnv`.

    Args:
        grids: ``(h, w)`` of every grid, coarse to fine; the last one is square and the sides of the others divide its.
        vocab_size: V, codes of a token. There may be 65,536 images, ``V^L``, at most.
        reward: a name in ``REWARDS``: "smooth", "copy", "sparse", "xor", "trap" or "random".
        seed: of the table, for the rewards that draw something.
        render_mode: as in `VARTextEnv`.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option out of its range; too many images.

    Examples:
        >>> env = VARTabularEnv(reward="xor")
        >>> env.reset(seed=0)[0]["tokens"]
        array([-1, -1, -1, -1, -1, -1, -1])
        >>> [env.step(np.full(grid, 1))[1] for grid in env.schedule.grids]  # no two differ
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        *,
        grids: Sequence[Sequence[int]] = DEFAULT_GRIDS,
        vocab_size: int = 2,
        reward: str = "smooth",
        seed: int = 0,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        mdp.reject("VARTabularEnv", unknown, OPTIONS)
        super().__init__(**tabular_parts(grids, vocab_size, reward, seed), render_mode=render_mode)


class VARTabularVectorEnv(VARTextVectorEnv):
    """A batch of ``num_envs`` episodes of ``VARTabular-v0`` in lockstep, as `VARTextVectorEnv`.

    Args:
        num_envs: N, the number of rows.
        grids, vocab_size, reward, seed, render_mode: as in `VARTabularEnv`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        grids: Sequence[Sequence[int]] = DEFAULT_GRIDS,
        vocab_size: int = 2,
        reward: str = "smooth",
        seed: int = 0,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        mdp.reject("VARTabularVectorEnv", unknown, ("num_envs", *OPTIONS))
        super().__init__(num_envs, **tabular_parts(grids, vocab_size, reward, seed), render_mode=render_mode)


keep_old_names(globals(), every_picture="every_image", MOST_PICTURES="MOST_IMAGES")
