"""A reward in parts with places: which part of an image's score came from where in the image."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Component(NamedTuple):
    """One part of an image's score, such as a letter.

    Images of one prompt have the same component where `kind` and `indices` are equal. One that an image lacks, such as
    a spurious letter, is worth 0 there.
    """

    kind: str  # "word", "letter", "spurious", "clause", ...
    indices: tuple[int, ...]  # which one of its kind: letter k of word w is (w, k)
    value: float  # what it adds to the score, in the score's units
    boxes: NDArray[np.float32] | None = None  # (n, 4), x0 y0 x1 y1 in pixels; None where nothing was found

    def scaled(self, factor: float, prefix: str = "") -> "Component":
        """The same part of a score that is `factor` times as large, its kind behind a prefix."""
        return self._replace(kind=prefix + self.kind, value=factor * self.value)

    def as_json(self) -> list[Any]:
        """Lists, numbers and None, which `from_json` reads."""
        boxes = None if self.boxes is None else self.boxes.tolist()
        return [self.kind, list(self.indices), self.value, boxes]


def checked(component: Component) -> Component:
    """The component with Python numbers and float32 boxes.

    Raises:
        ValueError: a value or a box that is not finite, or boxes that are not (n, 4).
    """
    value = float(component.value)
    if not np.isfinite(value):
        raise ValueError(f"the value of component {component.kind!r} {component.indices} is {value}, not finite")
    if component.boxes is None:
        return component._replace(indices=tuple(component.indices), value=value)
    boxes = np.asarray(component.boxes, np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(
            f"the boxes of component {component.kind!r} {component.indices} are {component.boxes!r:.80}, not a finite "
            "array (n, 4) of x0, y0, x1, y1 in pixels; give None where there is no place"
        )
    return Component(component.kind, tuple(component.indices), value, boxes)


def from_json(entry: Any) -> Component:
    """The inverse of `Component.as_json`. ValueError for anything else."""
    try:
        kind, indices, value, boxes = entry
        if not isinstance(kind, str) or type(value) not in (int, float) or not all(type(i) is int for i in indices):
            raise ValueError("of other types")
        place = None if boxes is None else np.array(boxes, np.float32).reshape(-1, 4)
        return checked(Component(kind, tuple(indices), value, place))
    except (TypeError, ValueError) as error:
        raise ValueError(f"its component {entry!r:.80} is not [kind, [index, ...], value, boxes or null]") from error
