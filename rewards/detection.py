"""What a detector of objects gives and takes, for the rewards that use one."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Detection(NamedTuple):
    """One object found in an image."""

    label: str  # one of the labels asked for
    score: float  # in [0, 1]
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image


class Detector(Protocol):
    """What the rewards need of a detector."""

    def detect(self, images: NDArray[np.uint8], labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """What each of the (B, H, W, 3) uint8 RGB images holds of its own list of `labels`."""
