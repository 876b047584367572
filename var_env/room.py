"""The room: a larger world of two to five words, placed freely, on grounds that have something on them.

The prompt names the words in reading order, the colours, and what is on the ground::

    A navy sign with a black disc that says "KITE", "RUN" and "HOTEL" in white letters

Text covers about a quarter of an image, so that a mask of the text leaves something out. Glyph cells are 8 x 16
pixels, one token of the finest grid wide and two high, and lines stand on rows of 16 pixels; see `docs/room.md`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from var_env.faults import COLOURS, DEFAULT_FAULTS, Faults, check_pairs, colour_name, kind_of
from var_env.scenes import LATTICE, PALETTE, TARGET_REGIONS, Scene, World
from var_env.schedule import ScaleSchedule

SIZE = 96  # px
ROW = 16  # px, the height of a line of text
ROOM_SCHEDULE = ScaleSchedule([(side, side) for side in (1, 2, 3, 4, 6, 8, 12)], patch=LATTICE)  # 274 tokens
PATTERNS = {  # by kind, as the prompt names them; a fault shows another one of the same kind
    "lines": {"bands": "{second} bands", "stripes": "{second} stripes"},
    "light": {"fade": "a {second} fade", "glow": "a {second} glow"},
    "shape": {
        "disc": "a {second} disc",
        "square": "a {second} square",
        "ring": "a {second} ring",
        "diamond": "a {second} diamond",
    },
}
NAMED = {name: text for kind in PATTERNS.values() for name, text in kind.items()}
ROOM_TEMPLATES = (
    "A {ground} sign with {pattern} that says {words} in {ink} letters",
    "{words} in {ink} on a {ground} wall with {pattern}",
    "A {ground} poster with {pattern} and the text {words} in {ink}",
)
_ASKED = tuple(
    re.compile(
        re.escape(template)
        .replace(r"\{words\}", '".*"')
        .replace(r"\{pattern\}", rf"(?:a )?(?P<second>\w+) (?P<pattern>{'|'.join(NAMED)})")
        .replace(r"\{", "(?P<")
        .replace(r"\}", r">\w+)")
    )
    for template in ROOM_TEMPLATES
)


@dataclass(frozen=True)
class RoomScene(Scene):
    """A scene of the room.

    Attributes:
        pattern: what is on the ground, one of `NAMED`.
        second: its RGB colour, 0 to 255.
    """

    cell: ClassVar[tuple[int, int, int]] = (LATTICE, ROW, 13)

    pattern: str = "bands"
    second: tuple[int, int, int] = (255, 255, 255)

    def background(self) -> np.ndarray:
        return patterned(self.pattern, self.ground, self.second, self.size)


class Room(World):
    """Draws scenes of one split; words have 3 to 8 letters, and no image has one twice.

    Args:
        size: the image's height and width in pixels, a multiple of 16, at least 64.
        split: as in :class:`~var_env.scenes.World`, with the same words.
        regions: the profile of the number of words an image, by default the paper's, `TARGET_REGIONS`. There is a row
            of 16 pixels for each.

    Raises:
        ValueError: an unknown split, another size, or a profile that is empty, does not sum to one, or asks for more
            words than fit.

    Examples:
        >>> Room().sample(np.random.default_rng(3)).prompt
        '"COVERTS" and "ACIKQLG" in yellow on a green wall with a black diamond'
    """

    cell = RoomScene.cell
    usual_regions = TARGET_REGIONS

    def __init__(
        self, size: int = SIZE, split: str = "train", regions: Mapping[Any, float] | str | None = None
    ) -> None:
        if size % ROW or size < 4 * ROW:
            raise ValueError(f"the room's size must be a multiple of {ROW} px and at least {4 * ROW}, got {size}")
        super().__init__(size, split, regions)

    def sample(self, rng: np.random.Generator) -> RoomScene:
        """Draw one scene; the same generator state gives the same scene."""
        count = int(rng.choice(list(self.regions), p=list(self.regions.values())))
        words: list[str] = []
        while len(words) < count:
            if (word := self._sample_word(rng)) not in words:
                words.append(word)
        boxes = self.place(tuple(words), rng)
        order = sorted(range(count), key=lambda i: (boxes[i][1], boxes[i][0]))  # reading order
        asked = tuple(words[i] for i in order)
        kinds = ("dark", "light") if rng.integers(2) else ("light", "dark")
        ground, second = (str(name) for name in rng.choice(list(PALETTE[kinds[0]]), 2, replace=False))
        ink = str(rng.choice(list(PALETTE[kinds[1]])))
        pattern = str(rng.choice(list(NAMED)))
        template = ROOM_TEMPLATES[rng.integers(len(ROOM_TEMPLATES))]
        prompt = template.format(
            words=listed(asked), ink=ink, ground=ground, pattern=NAMED[pattern].format(second=second)
        )
        return RoomScene(
            prompt,
            asked,
            tuple(boxes[i] for i in order),
            self.size,
            COLOURS[ink],
            COLOURS[ground],
            pattern,
            COLOURS[second],
        )

    def place(self, words: tuple[str, ...], rng: np.random.Generator) -> tuple[tuple[int, int, int, int], ...]:
        """One box a word, at random rows and columns, at least a cell's width from its neighbours in a row."""
        free = np.ones((self.size // ROW, self.size // LATTICE + 1), bool)  # one column more, for a last word's gap
        boxes = [(0, 0, 0, 0)] * len(words)
        for i in sorted(range(len(words)), key=lambda i: -len(words[i])):  # there is a row for each, so all find room
            width = len(words[i])
            places = np.argwhere(np.lib.stride_tricks.sliding_window_view(free, width + 1, 1).all(2))  # with the gap
            row, column = places[rng.integers(len(places))].tolist()
            free[row, column : column + width + 1] = False
            boxes[i] = (column * LATTICE, row * ROW, (column + width) * LATTICE, (row + 1) * ROW)
        return tuple(boxes)


def listed(words: tuple[str, ...]) -> str:
    """``"A", "B" and "C"``, in quotes."""
    quoted = [f'"{word}"' for word in words]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]]))


@functools.lru_cache(maxsize=256)
def patterned(pattern: str, ground: tuple[int, int, int], second: tuple[int, int, int], size: int) -> np.ndarray:
    """A ground without words: float32 RGB ``(size, size, 3)``, 0 to 255. Not to be changed in place."""
    first, other = np.array(ground, np.float32), np.array(second, np.float32)
    return first + pattern_mask(pattern, size)[..., None] * (other - first)


@functools.cache
def pattern_mask(name: str, size: int) -> np.ndarray:
    """How much of the second colour a pattern has at each pixel: float32 ``(size, size)`` in [0, 1]."""
    unit = size / 6
    y, x = np.mgrid[:size, :size] + 0.5
    down, right = np.abs(y - size / 2), np.abs(x - size / 2)
    radius = np.hypot(down, right)
    masks = {
        "bands": y // ROW % 2 == 1,
        "stripes": x // ROW % 2 == 1,
        "fade": y / size,
        "glow": np.clip(1 - radius / (3 * unit), 0, 1),
        "disc": radius <= 2 * unit,
        "square": np.maximum(down, right) <= 2 * unit,
        "ring": (radius > 1.25 * unit) & (radius <= 2.25 * unit),
        "diamond": down + right <= 2.5 * unit,
    }
    return masks[name].astype(np.float32)


def pattern_asked(scene: Scene) -> dict[str, str] | None:
    """The names of ink, ground, second colour and pattern that a scene of the room asks for.

    ``None`` for a scene of another world. One that was drawn knows them; of others the prompt tells.
    """
    if isinstance(scene, RoomScene):
        colours = {"ink": scene.ink, "ground": scene.ground, "second": scene.second}
        return {name: colour_name(rgb) for name, rgb in colours.items()} | {"pattern": scene.pattern}
    matches = (template.fullmatch(scene.prompt) for template in _ASKED) if not scene.boxes else ()
    found = next((match.groupdict() for match in matches if match), None)
    return found if found and all(found[name] in COLOURS for name in ("ink", "ground", "second")) else None


# Faults --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoomFaults(Faults):
    """`Faults` of the room.

    Any one of the words is left out with the rate ``missing`` has for the kind of the ground; the others stay where
    they are.

    Args:
        patterns: of each affected pattern the one of its kind that is drawn in its place and the rate,
            ``{"disc": ("square", 0.4)}``.
    """

    pairs: ClassVar[tuple[str, ...]] = ("letters", "colours", "patterns")
    tables: ClassVar[dict[str, Faults]] = {}

    patterns: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pairs("patterns", self.patterns, tuple(NAMED))
        for first, (second, _) in self.patterns.items():
            if not any(first in kind and second in kind for kind in PATTERNS.values()):
                raise ValueError(f"faults: patterns: {first!r} and {second!r} are of two kinds: {PATTERNS!r}")

    def check_world(self, world: World) -> None:
        """Raise ``ValueError`` where a family cannot show in a world's scenes."""
        if not isinstance(world, Room):
            raise ValueError(f"these faults are of the room, and not of a {type(world).__name__}")
        if any(self.missing.values()) and max(world.regions) < 2:
            raise ValueError("faults: missing leaves out one of several words, and this world's scenes have one")

    def may_miss(self, words: int, ground: str | None) -> bool:
        return words >= 2 and ground is not None and kind_of(ground) in self.missing

    def shown(self, scene: Scene, world: World, rng: np.random.Generator) -> Scene:
        """The scene that a pretraining image shows: the same prompt, other or fewer words, another ink or pattern."""
        assert isinstance(scene, RoomScene)
        words = tuple(self._drawn(letter, rng) for letter in (" ".join(scene.words)))
        shown = "".join(words).split(" ")
        out = int(rng.integers(len(shown)))  # which one may be left out
        keep = len(shown) < 2 or rng.random() >= self.missing.get(kind_of(colour_name(scene.ground)), 0.0)
        kept = [i for i in range(len(shown)) if keep or i != out]
        second, rate = self.colours.get(colour_name(scene.ink), ("", 0.0))
        ink = COLOURS[second] if rng.random() < rate else scene.ink
        second, rate = self.patterns.get(scene.pattern, ("", 0.0))
        pattern = second if rng.random() < rate else scene.pattern
        return replace(
            scene,
            words=tuple(shown[i] for i in kept),
            boxes=tuple(scene.boxes[i] for i in kept),
            ink=ink,
            pattern=pattern,
        )


ROOM_FAULTS = RoomFaults(
    letters=DEFAULT_FAULTS.letters,
    missing={"dark": 0.4, "light": 0.6},
    patterns={
        "bands": ("stripes", 0.4),
        "disc": ("square", 0.4),
        "glow": ("fade", 0.6),
        "diamond": ("ring", 0.6),
    },
)
RoomFaults.tables = {"default": ROOM_FAULTS, "none": RoomFaults()}
