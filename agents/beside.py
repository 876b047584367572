"""What is measured beside the reward: `var_env.attributes`, by the tables of faults of the shipped base policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from var_env.attributes import Record, attributes, shares
from var_env.faults import DEFAULT_FAULTS, Faults
from var_env.room import ROOM_FAULTS, RoomFaults, pattern_asked
from var_env.room_attributes import room_attributes
from var_env.scenes import Scene


def faults_of(scenes: Sequence[Scene]) -> Faults:
    """The table of the shipped base policy of the world that scenes are of."""
    return ROOM_FAULTS if all(pattern_asked(scene) for scene in scenes) else DEFAULT_FAULTS


def measure_beside(images: np.ndarray, scenes: Sequence[Any], words_read: Sequence[Sequence[str]] | None) -> Record:
    """The attributes of images by the table of `faults_of`, or nothing for scenes of another kind."""
    if not all(isinstance(scene, Scene) for scene in scenes):
        return {}
    return attributes_by(faults_of(scenes), images, scenes, words_read)


def attributes_by(
    faults: Faults, images: np.ndarray, scenes: Sequence[Scene], words_read: Sequence[Sequence[str]] | None
) -> Record:
    """The attributes that the world of a table has, see `attributes` and `room_attributes`."""
    if isinstance(faults, RoomFaults):
        return room_attributes(images, scenes, words_read, faults)
    return attributes(images, scenes, words_read, faults)


def applicable_shares(record: Record) -> dict[str, float]:
    """`shares` of a record without those that do not apply."""
    return {name: value for name, value in shares(record).items() if not math.isnan(value)} if record else {}
