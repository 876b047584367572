"""Repair by family, on images in which a known share of the faults was planted."""

import math

import numpy as np
import pytest

from agents.repair import repaired, right
from var_env.attributes import attributes
from var_env.faults import DEFAULT_FAULTS, FAMILIES, Faults
from var_env.scenes import World, render

COUNT = 150


def scenes_of(seed=0):
    world, rng = World(), np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(COUNT)]


def rates(letter, missing, colour):
    """The default table with other rates."""
    return Faults(
        {first: (second, letter) for first, (second, _) in DEFAULT_FAULTS.letters.items()},
        dict.fromkeys(DEFAULT_FAULTS.missing, missing),
        {first: (second, colour) for first, (second, _) in DEFAULT_FAULTS.colours.items()},
    )


def run(faults, seed):
    """What is measured of a policy that draws with these faults."""
    rng, asked = np.random.default_rng(seed), scenes_of()
    shown = [faults.shown(scene, World(), rng) for scene in asked]
    images = np.stack([render(scene) for scene in shown])
    return attributes(images, asked, [list(scene.words) for scene in shown], DEFAULT_FAULTS)


@pytest.fixture(scope="module")
def base():
    return [run(rates(0.5, 0.5, 0.5), 1)]


class TestRepaired:
    def test_each_family_for_itself(self, base):
        found = repaired(base, [run(rates(0.25, 0.0, 0.5), seed) for seed in (2, 3, 4)])
        for family, truth in {"letter": 0.5, "missing": 1.0, "colour": 0.0}.items():
            value, low, high = found[family]
            assert low <= truth <= high and low <= value <= high, family
        assert found["missing"] == (1.0, 1.0, 1.0)
        assert found["letter"][2] - found["letter"][1] < 0.4

    def test_by_hand(self):
        record = {
            "letters_affected": [2, 0, 2],
            "affected_right": [1, 0, 1],
            "pairs_affected": [1, 0, 1],
            "words_missing": [1, 1, 0],
            "ink_affected": [1, math.nan, 0],
            "ink_right": [0, math.nan, 1],
        }
        better = record | {"affected_right": [2, 0, 1], "words_missing": [0, 1, 0]}
        found = repaired([record], [record, better])
        assert found["letter"][0] == pytest.approx(1 - (3 / 8) / (1 / 2))
        assert found["missing"][0] == pytest.approx(1 - (1 / 4) / (1 / 2))
        assert found["colour"][0] == 0

    def test_illegible_letters_are_no_repair(self, base):
        blurred = {**base[0], "affected_confused": 0 * base[0]["affected_confused"]}
        assert repaired(base, [blurred])["letter"][0] == 0

    def test_the_base_itself(self, base):
        assert all(value == (0.0, 0.0, 0.0) for value in repaired(base, base).values())

    def test_a_family_that_cannot_show(self, base):
        clean = [run(rates(0, 0, 0), 1)]
        assert all(np.isnan(repaired(clean, base)[family]).all() for family in FAMILIES)  # nothing to repair
        unread = [{name: np.full(COUNT, np.nan) for name in base[0]}]
        assert all(np.isnan(repaired(base, unread)[family]).all() for family in FAMILIES)
        assert all(np.isnan(right(unread)[family]).all() for family in FAMILIES)


def test_right(base):
    for family, (value, low, high) in right(base).items():
        assert low < 0.5 < high and low < value < high, family


def test_bad_input(base):
    short = [{name: values[:10] for name, values in base[0].items()}]
    with pytest.raises(ValueError, match="agent: no records"):
        repaired(base, [])
    with pytest.raises(ValueError, match=r"agent: the runs must be measured on the same prompts, got \[10, 150\]"):
        repaired(base, base + short)
    with pytest.raises(ValueError, match="same prompts"):
        repaired(base, short)
