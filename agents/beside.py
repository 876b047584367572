"""What is measured beside the reward: `var_env.attributes`, by the table of faults of the shipped base policies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from var_env.attributes import Record, attributes, shares
from var_env.faults import DEFAULT_FAULTS
from var_env.scenes import Scene


def measure_beside(images: np.ndarray, scenes: Sequence[Any], words_read: Sequence[Sequence[str]] | None) -> Record:
    """`attributes` of images by the table of the shipped base policies, or nothing for scenes of another kind."""
    if not all(isinstance(scene, Scene) for scene in scenes):
        return {}
    return attributes(images, scenes, words_read, DEFAULT_FAULTS)


def applicable_shares(record: Record) -> dict[str, float]:
    """`shares` of a record without those that do not apply."""
    return {name: value for name, value in shares(record).items() if not math.isnan(value)} if record else {}
