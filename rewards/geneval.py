"""GenEval's rules (Ghosh et al., arXiv 2310.11513) as a reward: does the image hold the objects that its prompt lists?

As STAGE uses them (appendix B.1, item 1). A scene lists `clauses`, each of which is judged by itself on the boxes that
a detector found; an image's reward is their mean. `score_clause` is the rule; `GenEval` applies it to images.

Flow-GRPO's reward server, from which STAGE's reward descends, counts a position that failed as 0 and then as 1 too, so
that it never costs more than half. Here every clause has one score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rewards.base import HasWords, Reward, RewardOutput, check_count
from rewards.components import Component
from rewards.detection import Detection, Detector

KINDS = ("count", "colour", "position")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = {  # GenEval's ten
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "pink": (255, 192, 203),
    "brown": (139, 69, 19),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
MARGIN = 0.1  # of the sum of two boxes' sizes, by which their centres must be apart; GenEval's position_threshold

ColourOf = Callable[[NDArray[np.uint8], Detection], str]


class Clause(NamedTuple):
    """One thing that an image must show. Plain tuples and lists of the same entries do as well.

    >>> two_dogs = Clause("count", "dog", 2)
    >>> a_red_dog = Clause("colour", "dog", "red")
    >>> a_dog_beside_a_cat = Clause("position", "dog", "left of", "cat")
    """

    kind: str  # one of KINDS
    label: str  # the object, as the detector is asked for it
    value: int | str  # how many, at least 1; which colour; or one of RELATIONS
    other: str | None = None  # for a position, the label of the object that it refers to


def as_clause(entry: Any) -> Clause:
    """A clause from a tuple or list of its entries. ValueError saying what is wrong with it."""
    if not isinstance(entry, tuple | list) or len(entry) not in (3, 4):
        raise ValueError(f"{entry!r} is no clause; a clause is kind, label, value, as in ('count', 'dog', 2)")
    clause = Clause(*entry)
    kind, label, value, other = clause
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of the clause {entry!r}; available: {', '.join(KINDS)}")
    for name in (label, other) if kind == "position" else (label,):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the clause {entry!r} needs a label that is a non-blank string, got {name!r}")
    if kind != "position" and other is not None:
        raise ValueError(f"the clause {entry!r} has {other!r} too many; only a position has another label")
    if kind == "count" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"the clause {entry!r} needs a whole number of at least 1, got {value!r}")
    if kind == "colour" and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"the clause {entry!r} needs the name of a colour, got {value!r}")
    if kind == "position" and value not in RELATIONS:
        raise ValueError(f"unknown relation {value!r} of the clause {entry!r}; available: {', '.join(RELATIONS)}")
    if kind == "position" and label == other:
        raise ValueError(f"the clause {entry!r} relates {label!r} to itself; give two labels")
    return clause


def score_clause(clause: Clause, detections: Sequence[Detection], colour_of: Callable[[Detection], str]) -> float:
    """How far the objects found in an image meet one clause, in [0, 1]; 0 when an object is missing.

    - count: 1 - |N - N_ref| / N_ref for the N objects found, and at least 0.
    - colour: the share of the objects with this label that have the colour.
    - position: of all pairs of the two labels' objects, the share that stand in the relation.
    """
    found = [detection for detection in detections if detection.label == clause.label]
    if clause.kind == "count":
        wanted = int(clause.value)
        return max(1 - abs(len(found) - wanted) / wanted, 0.0)
    if clause.kind == "colour":
        return share([colour_of(detection) == clause.value for detection in found])
    others = [detection for detection in detections if detection.label == clause.other]
    return share([clause.value in relations(one.box, other.box) for one in found for other in others])


def share(matches: Sequence[bool]) -> float:
    """The fraction that is true; 0 of none."""
    return sum(matches) / len(matches) if matches else 0.0


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies as seen from another one: up to two of `RELATIONS`, none when they are too near.

    GenEval's rule, `relative_position` in github.com/djghosh13/geneval, evaluation/evaluate_images.py. The offset of
    the centres is shortened on each axis by a tenth of both boxes' sizes on that axis, to no less than nothing. What is
    left must be more than half of the centres' distance on the axis of the relation.
    """
    corners = np.array([box, other], np.float64).reshape(2, 2, 2)  # (box, corner, x and y)
    offset = np.subtract(*corners.mean(1))  # (2,)
    margin = MARGIN * np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    half = np.linalg.norm(offset) / 2
    x, y = beyond.tolist()  # y grows downwards
    holds = {"left of": -x > half, "right of": x > half, "above": -y > half, "below": y > half}
    return {relation for relation, true in holds.items() if true}


def nearest_colour(image: NDArray[np.uint8], detection: Detection) -> str:
    """The one of `COLOURS` that is nearest in RGB to the median of the box's central half.

    Good enough for flat, strong colours. GenEval asks CLIP which of the ten fits the object's crop: for photographs
    give `GenEval` a `colour_of` that does.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = detection.box
    columns = central_half(x0, x1, width)
    rows = central_half(y0, y1, height)
    colour = np.median(image[rows, columns].reshape(-1, 3), axis=0)  # (3,)
    distance = np.linalg.norm(np.array(list(COLOURS.values())) - colour, axis=1)  # (10,)
    return list(COLOURS)[distance.argmin()]


def central_half(start: float, end: float, size: int) -> slice:
    """The pixels of the middle of [start, end] inside an image, at least one."""
    first = int(np.clip(start + (end - start) / 4, 0, size - 1))
    return slice(first, max(first + 1, int(np.ceil(end - (end - start) / 4))))


class GenEval(Reward):
    """The mean over a scene's clauses of how far the image meets each, see `score_clause`.

    Scores lie in [0, 1]. Scenes need `.clauses`, a sequence of `Clause`; where it is empty the reward is not
    applicable. What counts as found, and how sure of it the detector must be, is the detector's business.

    Parts: count, colour and position, the mean over the clauses of that kind; not applicable to a scene without any.
    The regions are the boxes of the objects found. The components are the clauses, which add up to the score; the place
    of one is where its objects were found.

    Args:
        detector: "grounding_dino", or an object with its `detect` (see `detection.Detector`).
        detector_kwargs: options of the detector that is named.
        colour_of: from an image, (H, W, 3) uint8, and a detection in it to the name of a colour. With the default,
            clauses must name one of `COLOURS`.
    """

    name = "geneval"
    score_range = (0.0, 1.0)

    def __init__(
        self,
        detector: str | Detector = "grounding_dino",
        detector_kwargs: Mapping[str, Any] | None = None,
        colour_of: ColourOf = nearest_colour,
    ) -> None:
        if detector == "grounding_dino":
            from rewards.grounding_dino import GroundingDINODetector

            detector = GroundingDINODetector(**(detector_kwargs or {}))
        elif isinstance(detector, str):
            raise ValueError(f"unknown detector {detector!r}; available: grounding_dino, or an object with `detect`")
        elif detector_kwargs:
            raise ValueError(f"detector_kwargs are for a detector given by its name, not for {detector!r}")
        self.detector: Detector = detector
        self.colour_of = colour_of

    def load(self) -> None:
        """Load the detector's model now, where it has one."""
        if hasattr(self.detector, "load"):
            self.detector.load()

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes, each with a sequence of clauses that can be judged."""
        check_count(scenes, count)
        for index, scene in enumerate(scenes):
            for clause in clauses_of(scene, index):
                if clause.kind == "colour" and self.colour_of is nearest_colour and clause.value not in COLOURS:
                    raise ValueError(
                        f"the clause {tuple(clause)} of scene {index} asks for a colour that is never found; "
                        f"available: {', '.join(COLOURS)}, or give colour_of"
                    )

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        clauses = [clauses_of(scene, index) for index, scene in enumerate(scenes)]
        applicable = np.array([bool(listed) for listed in clauses], bool)
        found = self.detect(images, clauses)
        scores = np.zeros(len(images), np.float32)
        components: list[list[Component]] = [[] for _ in images]
        parts: dict[str, list[float | None]] = {kind: [None] * len(images) for kind in KINDS}
        for i in np.flatnonzero(applicable).tolist():
            colour_of = partial(self.colour_of, images[i])
            met = [score_clause(clause, found[i], colour_of) for clause in clauses[i]]
            scores[i] = np.mean(met)
            components[i] = [
                Component("clause", (index,), value / len(met), boxes_of(clause, found[i]))
                for index, (clause, value) in enumerate(zip(clauses[i], met, strict=True))
            ]
            for kind in {clause.kind for clause in clauses[i]}:
                of_kind = [value for clause, value in zip(clauses[i], met, strict=True) if clause.kind == kind]
                parts[kind][i] = sum(of_kind) / len(of_kind)
        return RewardOutput(
            scores,
            {kind: np.array(values, object) for kind, values in parts.items()},
            regions=[np.array([one.box for one in detections], np.float32).reshape(-1, 4) for detections in found],
            applicable=applicable,
            components=components,
        )

    def detect(self, images: NDArray[np.uint8], clauses: Sequence[Sequence[Clause]]) -> list[list[Detection]]:
        """The objects that each image's clauses name; nothing is asked about an image without clauses."""
        found: list[list[Detection]] = [[] for _ in images]
        asked = [i for i, listed in enumerate(clauses) if listed]
        labels = [
            list(dict.fromkeys(label for c in clauses[i] for label in (c.label, c.other) if label)) for i in asked
        ]
        answers = self.detector.detect(images[asked], labels) if asked else []
        if len(answers) != len(asked):
            raise ValueError(f"the detector gave {len(answers)} answers for {len(asked)} images")
        for i, wanted, answer in zip(asked, labels, answers, strict=True):
            for one in answer:
                if one.label not in wanted or not np.isfinite(one.box).all():
                    raise ValueError(f"the detector found {one} in image {i}, when asked for {', '.join(wanted)}")
            found[i] = list(answer)
        return found


def boxes_of(clause: Clause, detections: Sequence[Detection]) -> NDArray[np.float32] | None:
    """Where the objects of a clause were found, (n, 4); None where there are none."""
    boxes = [one.box for one in detections if one.label in (clause.label, clause.other)]
    return np.array(boxes, np.float32) if boxes else None


def clauses_of(scene: HasWords, index: int) -> list[Clause]:
    """The scene's clauses. ValueError when it has no such list or one of them is no clause."""
    clauses = getattr(scene, "clauses", None)
    if not isinstance(clauses, tuple | list):
        raise ValueError(
            f"scene {index} ({scene!r:.80}) needs `.clauses`, a sequence such as [('count', 'dog', 2)], which says "
            f"what the image must show; got {clauses!r:.80}"
        )
    try:
        return [as_clause(entry) for entry in clauses]
    except ValueError as error:
        raise ValueError(f"scene {index}: {error}") from error
