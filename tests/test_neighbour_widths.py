"""How often the reading changes with the neighbourhood's width, with a reward whose reading is known."""

import numpy as np
import pytest
import torch
from tiny import tiny_envs, tiny_policy

from agents import Decoding, held_out_scenes
from agents.experiments.neighbour_widths import decoded, neighbour_widths, width_table
from rewards.base import Reward, RewardOutput


class Hash(Reward):
    """Reads a word that differs between any two images."""

    name = "hash"

    def score(self, images, scenes):
        words = [[str(hash(image.tobytes()))] for image in images]
        zeros = np.zeros(len(images), np.float32)
        box = [np.zeros((1, 4), np.float32)] * len(images)
        return RewardOutput(zeros, {}, words, [[1.0]] * len(images), box)


@pytest.fixture
def measured(tokenizer):
    env = tiny_envs({"tokenizer": tokenizer, "reward": Hash()}, 1)
    scenes = held_out_scenes(env.world, 6)

    def measure(*widths):
        return neighbour_widths(tiny_policy(tokenizer), env, scenes, Decoding(), widths)

    return measure


def test_a_width_of_almost_0_changes_nothing_and_a_huge_one_all(measured):
    narrow, wide = measured(1e-6, 1e6)
    assert narrow == {"width": 1e-6, "swapped": 0.0, "read": 0.0, "read_error": 0.0, "reward": 0.0}
    assert wide["read"] == 1.0
    assert wide["swapped"] == pytest.approx(31 / 32, abs=0.06)  # uniform over 32 codes; four errors of 126 draws


def test_wider_swaps_more(measured):
    rows = measured(0.1, 0.5, 2.0)
    assert rows[0]["swapped"] < rows[1]["swapped"] < rows[2]["swapped"]
    assert width_table(rows).count("\n") >= 3


def test_images_are_those_of_the_environment(tokenizer):
    env = tiny_envs({"tokenizer": tokenizer, "reward": Hash()}, 2)
    env.reset(seed=0)
    grids = [torch.randint(32, (2, n, 1), generator=torch.Generator().manual_seed(n)) for n in env.schedule.sizes]
    for grid in grids:
        *_, info = env.step(grid.squeeze(-1).numpy())
    assert np.array_equal(decoded(tokenizer, grids), np.stack(list(info["image"])))


def test_bad_width(measured):
    with pytest.raises(ValueError, match=r"--neighbour-width must be above 0, got 0\.0"):
        measured(0.5, 0.0)
