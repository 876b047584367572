"""A reward that is cheap, exact and, when a word tells it to, troublesome. Spawned workers import it."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rewards.base import Reward, RewardOutput
from rewards.components import Component


class Toy(Reward):
    """The brightness of the image plus the length of the words. A word such as "DIE" or "WAIT:file" gives an order."""

    name = "toy"
    score_range = (0.0, 100.0)

    def score(self, images, scenes):
        for scene in scenes:
            for word in scene.words:
                order, _, file = word.partition(":")
                getattr(self, f"_{order.lower()}", lambda file: None)(Path(file))
        scores = images.mean((1, 2, 3)) / 255 + [len("".join(scene.words)) for scene in scenes]
        scores[[scene.words[0] == "NAN" for scene in scenes]] = np.nan
        return RewardOutput(
            scores,
            {"first": images[:, 0, 0, 0] / 7, "even": [None if v % 2 else v for v in images[:, 0, 0, 0].tolist()]},
            [list(scene.words) for scene in scenes],
            [[1 / 3] * len(scene.words) for scene in scenes],
            [np.full((i[0, 0, 0] % 3, 4), i[0, 0, 1] / 3, np.float32) for i in images],
            np.array([scene.words[0] != "NOTHING" for scene in scenes]),
            [self._components(image) for image in images],
        )

    def _components(self, image):
        place = np.full((1, 4), image[0, 0, 1] / 3, np.float32)
        return [Component("pixel", (i, 0), image[i, 0, 0] / 7, place if i else None) for i in range(image[0, 0, 0] % 3)]

    def _die(self, file):
        os.kill(os.getpid(), signal.SIGKILL)

    def _dieonce(self, file):
        if not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def _hangonce(self, file):
        if not file.exists():
            file.touch()
            time.sleep(600)

    def _bad(self, file):
        raise ValueError("a word is BAD; use a good one")

    def _crash(self, file):
        raise Odd("one", "two")

    def _wait(self, file):
        Path(f"{file}.started").touch()
        until(file.exists)


class Odd(Exception):
    """One that a pickle cannot bring back."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Broken(Toy):
    """Cannot load."""

    def load(self):
        raise OSError("no weights here; fetch them")


class Fatal(Toy):
    """Ends its process in loading."""

    def load(self):
        os._exit(3)


def until(condition, seconds=60):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def batch(count, *words, seed=0, size=16):
    """Images that all differ, and scenes with one word each: those given, then W, WW, ..."""
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    names = [*words, *("W" * (1 + index % 5) for index in range(count - len(words)))]
    return images, [SimpleNamespace(words=(name,), prompt=name) for name in names]


def assert_same(output, expected):
    """Bit for bit, NaN and all."""
    assert output.parts.keys() == expected.parts.keys()
    assert (output.words, output.confidences) == (expected.words, expected.confidences)
    assert (output.reads, output.reads_words) == (expected.reads, expected.reads_words)
    np.testing.assert_array_equal(output.scores, expected.scores)
    np.testing.assert_array_equal(output.applicable, expected.applicable)
    for name, values in expected.parts.items():
        np.testing.assert_array_equal(output.parts[name], values)
    for region, other in zip(output.regions, expected.regions, strict=True):
        np.testing.assert_array_equal(region, other)
    for found, others in zip(output.components, expected.components, strict=True):
        for component, other in zip(found, others, strict=True):
            assert component[:3] == other[:3] and (component.boxes is None) == (other.boxes is None)
            np.testing.assert_array_equal(component.boxes, other.boxes)
