"""Components: what they may hold, and their way through JSON."""

import json

import numpy as np
import pytest

from rewards.base import RewardOutput
from rewards.components import Component, checked, from_json

BOX = np.array([[1 / 3, 2, 3, 4]], np.float32)


def same(left, right):
    assert left[:3] == right[:3] and (left.boxes is None) == (right.boxes is None)
    if left.boxes is not None:
        np.testing.assert_array_equal(left.boxes, right.boxes)
        assert left.boxes.dtype == right.boxes.dtype == np.float32


@pytest.mark.parametrize("boxes", [None, BOX, np.zeros((0, 4), np.float32)], ids=["none", "one", "empty"])
def test_json_gives_them_back(boxes):
    component = Component("letter", (0, 3), 1 / 7, boxes)
    same(from_json(json.loads(json.dumps(component.as_json()))), component)


def test_scaled():
    assert Component("letter", (0, 3), 0.5).scaled(-2, "ocr/") == Component("ocr/letter", (0, 3), -1.0)


def test_numpy_s_numbers_and_lists_become_plain():
    found = checked(Component("letter", [0, 3], np.float32(0.5), BOX.tolist()))
    assert found.indices == (0, 3) and type(found.value) is float
    same(found, Component("letter", (0, 3), 0.5, BOX))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Component("letter", (0,), float("nan")), r"component 'letter' \(0,\) is nan, not finite"),
        (Component("letter", (0,), 1.0, np.zeros(4)), r"boxes of component 'letter' \(0,\) are .*not a finite array"),
        (Component("letter", (0,), 1.0, np.full((1, 4), np.inf)), "give None where there is no place"),
    ],
)
def test_what_is_refused(component, message):
    with pytest.raises(ValueError, match=message):
        RewardOutput(np.zeros(1), components=[[component]])


def test_one_list_an_image():
    assert RewardOutput(np.zeros(2)).components == [[], []]
    with pytest.raises(ValueError, match="components holds 1 entries, expected 2"):
        RewardOutput(np.zeros(2), components=[[]])


@pytest.mark.parametrize("entry", [None, [], "four", ["a", [0], "1", None], ["a", [0.5], 1, None], [1, [0], 1, None]])
def test_other_json_is_an_error(entry):
    with pytest.raises(ValueError, match=r"is not \[kind, \[index, \.\.\.\], value, boxes or null\]"):
        from_json(entry)
