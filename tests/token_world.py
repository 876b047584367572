"""A world whose optimum is known: images show their tokens, and the reward counts those that are right.

Two grids, 1 x 1 and 2 x 2, of 4 codes. Red is the code of the first grid and green those of the second, so the reward
reads all five tokens back from the image. The best image scores exactly 1; a policy that draws codes uniformly
scores 1/4 on average.
"""

import numpy as np
import torch

from agents.policies.var_text import VARTextPolicy
from rewards.base import Reward, RewardOutput
from rewards.components import Component
from var_env import ScaleSchedule, Tokenizer
from var_env.tabular import cell_boxes

OPTIMUM = 1.0
CODES = 4
TARGET = ([2], [0, 1, 2, 3])  # the right code of each token, grid by grid, row by row


class TokenTokenizer(Tokenizer):
    """Channel t of the canvas, and of the image, holds ``(code + 1) / V`` of grid t, and 0 before it is written."""

    def __init__(self, schedule=ScaleSchedule([(1, 1), (2, 2)], patch=32), vocab_size=CODES):  # noqa: B008 (frozen)
        super().__init__(schedule, vocab_size, channels=len(schedule), width=8, blocks=0)
        angles = 2 * torch.pi * torch.arange(vocab_size) / vocab_size
        self.codebook = torch.stack([angles.cos(), angles.sin()], 1)  # no two codes are alike

    def contribution(self, t, grid):
        (h, w), (height, width) = self.schedule.grids[t], self.schedule.grids[-1]
        values = (grid.view(-1, h, w) + 1) / self.vocab_size
        added = self.blank(len(grid))
        added[:, t] = values.repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)
        return added

    @torch.no_grad()
    def decode(self, canvas):
        cells = (255 * canvas).round().to(torch.uint8)  # (B, T, H, W)
        pixels = cells.repeat_interleave(self.schedule.patch, 2).repeat_interleave(self.schedule.patch, 3)
        blue = torch.zeros_like(pixels[:, :1])
        return torch.cat([pixels, blue], 1).permute(0, 2, 3, 1).contiguous()


def tokens_shown(images, tokenizer):
    """The tokens in images ``(B, S, S, 3)``: T arrays ``(B, n_t)``."""
    found = []
    for t, (h, w) in enumerate(tokenizer.schedule.grids):
        rows, columns = images.shape[1] // h, images.shape[2] // w
        corners = images[:, ::rows, ::columns, t].reshape(len(images), -1)
        found.append(np.round(corners * (tokenizer.vocab_size / 255)).astype(np.int64) - 1)
    return found


class RightTokens(Reward):
    """The fraction of the tokens that are the target's, one component each; claims to have read a word all over the
    image."""

    name = "right_tokens"

    def __init__(self, tokenizer, target=TARGET):
        self.tokenizer, self.target = tokenizer, np.concatenate(target)
        self.places = cell_boxes(tokenizer.schedule)  # (L, 4)

    def score(self, images, scenes):
        right = np.concatenate(tokens_shown(images, self.tokenizer), 1) == self.target  # (B, L)
        count, side = len(images), images.shape[1]
        return RewardOutput(
            right.mean(1),
            {"coarse": right[:, 0]},
            [["READ"]] * count,
            [[1.0]] * count,
            [np.array([[0, 0, side, side]], np.float32)] * count,
            components=[
                [
                    Component("token", (i,), is_right / len(row), self.places[i : i + 1])
                    for i, is_right in enumerate(row)
                ]
                for row in right
            ],
        )


def token_world():
    """Keyword arguments of its environment, as `conftest.parts`."""
    tokenizer = TokenTokenizer().eval().requires_grad_(False)
    return {"tokenizer": tokenizer, "reward": RightTokens(tokenizer)}


def new_policy(tokenizer, seed=0):
    """Small and nearly uniform. Every token's place is a direction of its own, so that what is learned at one place
    does not spill over to the others, and large steps do not end at one code for all."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = VARTextPolicy(tokenizer, width=16, layers=1, heads=2, precision="fp32")
    policy.position.data = torch.eye(*policy.position.shape)
    policy.sharpness.requires_grad_(False)  # made for a hundredth of the learning rates here
    return policy.eval()
