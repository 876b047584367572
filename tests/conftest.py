"""Small stand-ins for the shipped parts, for tests that are not about images that can be read."""

import os

import numpy as np
import pytest
import torch

from rewards.base import Reward, RewardOutput
from rewards.components import Component
from var_env import ScaleSchedule, Tokenizer

# The files that take longest. Processes that share the tests begin with them, or one would end long after the others.
LONGEST = ("processes", "examples", "going_on", "ray", "ablate", "wheel", "service")

if "PYTEST_XDIST_WORKER" in os.environ:  # one process for each core: one thread for each, and for those that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


class Brightness(Reward):
    """Scores the mean brightness of the image, whose parts are its halves, and claims to have read a fixed word; counts
    its calls."""

    name = "brightness"

    def __init__(self):
        self.calls = 0

    def score(self, images, scenes):
        self.calls += 1
        mean = images.mean((1, 2, 3)).astype(np.float32) / 255
        box = np.array([[0, 0, 8, 8]], np.float32)
        count = len(images)
        halves = [[self.half(image, i) for i in range(2)] for image in images]
        return RewardOutput(mean, {"mean": mean}, [["SEEN"]] * count, [[0.5]] * count, [box] * count, components=halves)

    @staticmethod
    def half(image, i):
        """The upper or the lower one."""
        middle, side = len(image) // 2, image.shape[1]
        rows = slice(i * middle, (i + 1) * middle)
        place = np.array([[0, rows.start, side, rows.stop]], np.float32)
        return Component("half", (i,), image[rows].mean() / 255 / 2, place)


@pytest.fixture
def schedule():
    return ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)  # 64 px, 21 tokens


@pytest.fixture
def tokenizer(schedule):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokenizer(schedule, vocab_size=32, channels=4, width=8, blocks=1).eval().requires_grad_(False)


@pytest.fixture
def reward():
    return Brightness()


@pytest.fixture
def parts(tokenizer, reward):
    """Keyword arguments of an environment with the small tokenizer and the toy reward."""
    return {"tokenizer": tokenizer, "reward": reward}
