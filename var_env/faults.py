"""Planted faults: known errors that a base policy learns in pretraining, for reinforcement learning to repair.

The prompt of a pretraining scene asks for the right thing and its image shows a fault, with known rates, as captions
from the web do. A policy trained on such scenes is sure of everything else and undecided exactly there. The
environment, the reward and every evaluation ask for the right thing. Three families:

=========  ============================================================================  =================
family     what the image shows                                                          can OCR see it?
=========  ============================================================================  =================
letter     the second letter of a pair in place of the first                             yes
missing    of two words the upper one alone                                              yes
colour     the ink in another colour, of the same kind: a light one for a light one      no: it is a probe
=========  ============================================================================  =================

Rates lie around one half, some above and some below, so that neither a lower temperature nor greedy decoding repairs
anything: greedy decoding draws a letter with a rate of 0.4 right and one with a rate of 0.6 wrong. No second of a
pair is the first of another, so that what was drawn tells which fault it is. `docs/faults.md` has the reasons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from var_env.scenes import PALETTE, RANDOM_LETTERS, Scene, World

FAMILIES = ("letter", "missing", "colour")
ALL_FAMILIES = (*FAMILIES, "ground")  # of all worlds: the room has "ground" in place of "colour"
COLOURS = PALETTE["dark"] | PALETTE["light"]


@dataclass(frozen=True)
class Faults:
    """What a pretraining image shows in place of what its prompt asks for, and how often.

    Args:
        letters: of each affected letter the one that is drawn in its place and the rate, ``{"A": ("H", 0.4)}``. Every
            occurrence is decided on its own.
        missing: the rate at which the lower of two words is left out, by the kind of the ground: "dark" or "light".
        colours: of each affected ink the one that is drawn in its place and the rate, ``{"navy": ("black", 0.6)}``.

    Raises:
        ValueError: a letter that the world does not draw, a colour that the palette does not have or one of another
            kind, a rate outside 0 to 1, or a second of a pair that is itself affected.
    """

    pairs: ClassVar[tuple[str, ...]] = ("letters", "colours")  # families of pairs with a rate
    tables: ClassVar[dict[str, Faults]] = {}  # those that `load` knows by name

    letters: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    colours: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pairs("letters", self.letters, tuple(RANDOM_LETTERS))
        check_pairs("colours", self.colours, tuple(COLOURS))
        for first, (second, _) in self.colours.items():
            if kind_of(first) != kind_of(second):
                raise ValueError(
                    f"faults: colours: {first!r} is a {kind_of(first)} colour and {second!r} is not; "
                    f"choose one of {', '.join(PALETTE[kind_of(first)])}, or the ink may vanish on its ground"
                )
        for kind, rate in self.missing.items():
            if kind not in PALETTE:
                raise ValueError(f"faults: missing: unknown kind of ground {kind!r}: choose {' or '.join(PALETTE)}")
            _check_rate(f"missing: {kind}", rate)

    def check_world(self, world: World) -> None:
        """Raise ``ValueError`` where a family cannot show in a world's scenes."""
        if any(self.missing.values()) and not world.regions.get(2):
            raise ValueError(
                f"faults: missing leaves out one of two words, and this world's scenes have "
                f"{sorted(world.regions)} words: drop the family, or give the world regions with 2"
            )

    def shown(self, scene: Scene, world: World, rng: np.random.Generator) -> Scene:
        """The scene that a pretraining image shows: the same prompt, other words, layout and ink.

        Args:
            scene: what the prompt asks for, drawn by `world`.
            world: places the words that are left.
            rng: decides. Every letter, pair of words and ink takes one number, whether it is affected or not.
        """
        words = tuple("".join(self._drawn(letter, rng) for letter in word) for word in scene.words)
        left_out = len(words) == 2 and rng.random() < self.missing.get(kind_of(colour_name(scene.ground)), 0.0)
        second, rate = self.colours.get(colour_name(scene.ink), ("", 0.0))
        ink = COLOURS[second] if rng.random() < rate else scene.ink
        if left_out:
            return replace(scene, words=words[:1], boxes=world.place(words[:1], rng), ink=ink)
        return replace(scene, words=words, ink=ink)

    def _drawn(self, letter: str, rng: np.random.Generator) -> str:
        second, rate = self.letters.get(letter, ("", 0.0))
        return second if rng.random() < rate else letter

    def may_miss(self, words: int, ground: str | None) -> bool:
        """Whether one of so many words on a ground of this colour may be left out."""
        return words == 2 and ground is not None and kind_of(ground) in self.missing

    def affected_letters(self, words: tuple[str, ...]) -> int:
        """How many letters of the words asked for may be drawn as another."""
        return sum(letter in self.letters for word in words for letter in word)

    # Files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``Faults(**data)`` reads it."""
        pairs = {name: {first: list(pair) for first, pair in getattr(self, name).items()} for name in self.pairs}
        return {"letters": pairs.pop("letters"), "missing": dict(self.missing), **pairs}

    @classmethod
    def load(cls, name: str | Path) -> Faults:
        """A table by name, "default" or "none", or from a JSON file that has the three families as objects.

        Raises:
            ValueError: no such file, no JSON, or a family that is not known.
        """
        if str(name) in cls.tables:
            return cls.tables[str(name)]
        try:
            data = json.loads(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{name}: {error.strerror or error}; give a file, or one of {', '.join(cls.tables)}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{name}: this is not a JSON file of faults: {error}") from None
        return cls.from_dict(data, str(name))

    @classmethod
    def from_dict(cls, data: Any, source: str = "faults") -> Faults:
        """What `to_dict` wrote. Errors begin with ``source``."""
        families = ("letters", "missing", *cls.pairs[1:])
        if not isinstance(data, dict) or set(data) - set(families):
            raise ValueError(f"{source}: expected an object with {', '.join(families)}, got {str(data)[:80]}")
        try:
            pairs = {
                family: {
                    str(first): (str(second), float(rate)) for first, (second, rate) in data.get(family, {}).items()
                }
                for family in cls.pairs
            }
            missing = {str(kind): float(rate) for kind, rate in data.get("missing", {}).items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f'{source}: a pair is written "A": ["H", 0.4] and a rate of missing words "dark": 0.4'
            ) from None
        return cls(missing=missing, **pairs)


def kind_of(colour: str) -> str:
    """ "dark" or "light"."""
    return next(kind for kind, colours in PALETTE.items() if colour in colours)


def colour_name(rgb: tuple[int, int, int]) -> str:
    """The palette's name of a colour."""
    return next(name for name, value in COLOURS.items() if value == tuple(rgb))


def _check_rate(what: str, rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"faults: {what}: a rate lies between 0 and 1, got {rate}")


def check_pairs(family: str, pairs: Mapping[str, tuple[str, float]], known: tuple[str, ...]) -> None:
    """``ValueError``: a name is not known, a second is the first or itself affected, or a rate is none."""
    for first, (second, rate) in pairs.items():
        for name in (first, second):
            if name not in known:
                raise ValueError(f"faults: {family}: unknown {name!r}: this world draws {', '.join(known)}")
        if first == second or second in pairs:
            raise ValueError(
                f"faults: {family}: {first!r} is drawn as {second!r}, which "
                f"{'is the same' if first == second else 'is itself affected'}: what was drawn would not tell the fault"
            )
        _check_rate(f"{family}: {first}", rate)


DEFAULT_FAULTS = Faults(
    letters={
        # Pairs that differ in few patches beside pairs that differ in most, so that not one grid decides them all.
        "A": ("H", 0.4),
        "C": ("Z", 0.4),
        "N": ("W", 0.4),
        "E": ("F", 0.5),
        "K": ("X", 0.5),
        "P": ("R", 0.5),
        "D": ("U", 0.6),
        "I": ("Y", 0.6),
        "L": ("T", 0.6),
    },
    missing={"dark": 0.4, "light": 0.6},
    colours={
        "green": ("maroon", 0.4),
        "yellow": ("pink", 0.4),
        "navy": ("black", 0.6),
        "cyan": ("white", 0.6),
    },
)
Faults.tables = TABLES = {"default": DEFAULT_FAULTS, "none": Faults()}
