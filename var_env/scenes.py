"""The world of VARText: images of words, their prompts and their boxes, drawn from a seed.

A scene is a coloured ground with one word a line, in capitals of one colour. The prompt names all of it in plain
English, with the words in double quotes::

    A navy sign that says "KITE" above "RUN" in white letters

Glyphs stand on a lattice of 8 pixels, the tokenizer's patch, and the colours come from a small palette that the
prompt names: apart from the lines' heights, the prompt decides the image. That is what lets a policy of a few
million weights learn to spell on a CPU.

Words come from a list and, half of the time, from the alphabet at random. Every word belongs to exactly one of the
splits ``train``, ``val`` and ``test``, by a hash of its letters, so no seed can leak a held-out word into training.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from var_env.quotes import check_text, quoted_texts, quoted_words

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["quoted_texts", "quoted_words"]  # for those who look for them here

MAX_PROMPT_BYTES = 192  # of this world's prompts, and what the shipped policy reads; other worlds may have other limits
LATTICE = 8  # px; glyph cells start on multiples of it
CELL_WIDTH, CELL_HEIGHT = 16, 24  # px, the cell of one glyph: 2 x 3 lattice cells
FONT_SIZE = 26  # px; the advance of DejaVu Sans Mono Bold at this size fills the cell's width
RANDOM_LETTERS = ascii_uppercase.replace("O", "")  # OCR takes O for 0 where no word tells them apart
SPLITS = ("train", "val", "test")
DEFAULT_REGIONS = {1: 0.5, 2: 0.5}
TARGET_REGIONS = {2: 0.2, 3: 0.3, 4: 0.3, 5: 0.2}  # the paper's appendix C: its evaluation set, and how it filters
PALETTE = {
    "dark": {"black": (20, 20, 24), "navy": (16, 32, 96), "maroon": (104, 16, 32), "green": (8, 72, 40)},
    "light": {"white": (244, 244, 240), "yellow": (248, 216, 64), "pink": (248, 176, 200), "cyan": (120, 224, 240)},
}
TEMPLATES = (
    "A {ground} sign that says {words} in {ink} letters",
    "{words} in {ink} on a {ground} wall",
    "A {ground} poster with the text {words} in {ink}",
)


@dataclass(frozen=True)
class Scene:
    """One prompt with its target words and, when it was drawn by :class:`World`, the layout that shows them.

    Attributes:
        prompt: plain English, the words in double quotes, at most ``max_prompt_bytes`` of its world in UTF-8.
        words: the target words, top to bottom.
        boxes: one ``(x0, y0, x1, y1)`` a word, in pixels, half open; empty for a scene made from a prompt alone.
        size: height and width of the image in pixels.
        ink, ground: RGB colours, 0 to 255.
    """

    prompt: str
    words: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    size: int = 64
    ink: tuple[int, int, int] = (0, 0, 0)
    ground: tuple[int, int, int] = (255, 255, 255)

    cell: ClassVar[tuple[int, int, int]] = (CELL_WIDTH, CELL_HEIGHT, FONT_SIZE)  # of a glyph, and its font's size, px

    def background(self) -> np.ndarray:
        """What is behind the words: float32 RGB, ``(size, size, 3)`` or what broadcasts to it."""
        return np.array(self.ground, np.float32)


class World:
    """Draws scenes of one split.

    ``max_prompt_bytes`` is the length of the longest prompt that its environments take.

    Args:
        size: the image's height and width in pixels, a multiple of 8, at least 48.
        split: ``"train"``, ``"val"`` or ``"test"``; no word is in two of them.
        regions: the profile of the number of words an image, as in the paper's appendix C: a mapping from a
            count to its probability, or ``"target"`` for the paper's own, `TARGET_REGIONS`. At 64 pixels one or two
            words fit, at 128 up to five.
        placement: ``"free"`` draws the lines' heights, so that the coarse grids have a layout to decide; ``"even"``
            spreads them over the height, one alone in the middle, and then the prompt decides the image.

    Raises:
        ValueError: an unknown split or placement, a size off the lattice, or a profile that is empty, does not sum
            to one, or asks for more words than fit.

    Examples:
        >>> scene = World().sample(np.random.default_rng(3))
        >>> scene.prompt
        'A navy sign that says "ELK" above "WHGD" in yellow letters'
    """

    max_prompt_bytes = MAX_PROMPT_BYTES
    cell = Scene.cell
    usual_regions: Mapping[int, float] = DEFAULT_REGIONS
    _made_with: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        world = super().__new__(cls)
        world._made_with = (arguments, options)  # for `of_split`, whatever a subclass's constructor takes
        return world

    def __init__(
        self,
        size: int = 64,
        split: str = "train",
        regions: Mapping[Any, float] | str | None = None,
        placement: str = "free",
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if placement not in ("even", "free"):
            raise ValueError(f"unknown placement {placement!r}: choose 'even' or 'free'")
        if size % LATTICE or size < 2 * CELL_HEIGHT:
            raise ValueError(f"size must be a multiple of {LATTICE} px and at least {2 * CELL_HEIGHT}, got {size}")
        self.size, self.split, self.placement = size, split, placement
        self.max_letters = min(8, size // self.cell[0])
        self.regions = region_profile(self.usual_regions if regions is None else regions)
        most = size // self.cell[1]
        if any(not 1 <= count <= most for count in self.regions):
            raise ValueError(f"regions must lie in 1..{most} at {size} px, got the counts {sorted(self.regions)}")
        self._words = word_list(split, self.max_letters)

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw one scene; the same generator state gives the same scene."""
        count = int(rng.choice(list(self.regions), p=list(self.regions.values())))
        words = tuple(self._sample_word(rng) for _ in range(count))
        dark_ground = bool(rng.integers(2))
        ground = str(rng.choice(list(PALETTE["dark" if dark_ground else "light"])))
        ink = str(rng.choice(list(PALETTE["light" if dark_ground else "dark"])))
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        prompt = template.format(words=" above ".join(f'"{word}"' for word in words), ink=ink, ground=ground)
        colours = PALETTE["dark"] | PALETTE["light"]
        return Scene(prompt, words, self.place(words, rng), self.size, colours[ink], colours[ground])

    def held_out(self, count: int, seed: int = 0, split: str = "test") -> list[Scene]:
        """``count`` scenes of another split; the first ones are the same whatever the count."""
        return drawn(self.of_split(split), count, seed)

    def of_split(self, split: str) -> Self:
        """This world with another split: of the same class, made with the same arguments.

        A subclass whose constructor has no ``split`` is copied, and the copy's ``split`` is set; it has to look at it
        when it samples, or to override this.

        Raises:
            ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        arguments, options = self._made_with
        bound = inspect.signature(type(self).__init__).bind(self, *arguments, **options)
        names = bound.signature.parameters
        extra = next((name for name, p in names.items() if p.kind is p.VAR_KEYWORD), None)
        if "split" in names:
            bound.arguments["split"] = split
        elif extra is not None:
            bound.arguments[extra] = {**bound.arguments.get(extra, {}), "split": split}
        else:
            other = copy.copy(self)
            other.split, other._words = split, word_list(split, self.max_letters)
            return other
        return type(self)(*bound.args[1:], **bound.kwargs)

    def _sample_word(self, rng: np.random.Generator) -> str:
        """A listed word or, half of the time, random letters whose hash falls into this split."""
        if rng.random() < 0.5:
            return self._words[rng.integers(len(self._words))]
        length = int(rng.integers(3, self.max_letters + 1))
        while True:
            word = "".join(RANDOM_LETTERS[i] for i in rng.integers(len(RANDOM_LETTERS), size=length))
            if split_of(word) == self.split:
                return word

    def place(self, words: tuple[str, ...], rng: np.random.Generator) -> tuple[tuple[int, int, int, int], ...]:
        """One box a word, centred, at the lattice rows that ``_rows`` gives."""
        boxes = []
        for word, row in zip(words, self._rows(len(words), rng), strict=True):
            x = (self.size - len(word) * CELL_WIDTH) // 2 // LATTICE * LATTICE
            boxes.append((x, row * LATTICE, x + len(word) * CELL_WIDTH, row * LATTICE + CELL_HEIGHT))
        return tuple(boxes)

    def _rows(self, lines: int, rng: np.random.Generator) -> list[int]:
        """The lattice row at which each line starts."""
        height = CELL_HEIGHT // LATTICE
        free = self.size // LATTICE - lines * height  # rows without text
        if self.placement == "even":
            above = [free // 2] if lines == 1 else [free * line // (lines - 1) for line in range(lines)]
            return [above[line] + line * height for line in range(lines)]
        apart = 1 if free >= lines - 1 else 0  # an empty row between neighbours
        cuts = np.sort(rng.integers(free - apart * (lines - 1) + 1, size=lines))
        return [int(cuts[line]) + line * (height + apart) for line in range(lines)]


def drawn(world: Any, count: int, seed: int) -> list[Scene]:
    """``count`` scenes that a world's ``sample`` draws; the first ones are the same whatever the count."""
    rng = np.random.default_rng(seed)
    return [world.sample(rng) for _ in range(count)]


def region_profile(regions: Mapping[Any, float] | str) -> dict[int, float]:
    """A profile of counts and their probabilities as a new dict; keys may be strings, as JSON has them.

    Raises:
        ValueError: a name other than ``"target"``, a key that is no number, or probabilities that do not sum to one.
    """
    if isinstance(regions, str):
        if regions != "target":
            raise ValueError(f"unknown region profile {regions!r}: give 'target', or counts and their probabilities")
        regions = TARGET_REGIONS
    profile = {int(count): float(p) for count, p in regions.items()}
    if abs(sum(profile.values()) - 1) > 1e-6 or min(profile.values()) < 0:
        raise ValueError(f"regions must map counts to probabilities that sum to 1, got {profile}")
    return profile


def render(scene: Scene) -> np.ndarray:
    """Draw a scene that has a layout: uint8 ``(size, size, 3)``, RGB."""
    if len(scene.boxes) != len(scene.words):
        raise ValueError(f"this scene has no layout to draw (made from the prompt alone?): {scene.prompt!r}")
    coverage = np.zeros((scene.size, scene.size, 1), np.float32)  # 1 where ink lies
    width = scene.cell[0]
    for word, (x, y, _, y_end) in zip(scene.words, scene.boxes, strict=True):
        for i, letter in enumerate(word):
            left = x + i * width
            coverage[y:y_end, left : left + width, 0] = glyph(letter, scene.cell)
    ink, ground = np.array(scene.ink, np.float32), scene.background()
    return np.rint(ground + coverage * (ink - ground)).astype(np.uint8)


def encode_prompt(prompt: str, limit: int = MAX_PROMPT_BYTES) -> np.ndarray:
    """UTF-8 bytes, padded with zeros: uint8 ``(limit,)``. ``ValueError`` when the prompt is too long or no text."""
    check_text(prompt)
    data = prompt.encode()
    if len(data) > limit:
        raise ValueError(f"the prompt has {len(data)} bytes, at most {limit} fit: {prompt!r}")
    padded = np.zeros(limit, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return padded


def scene_from_prompt(prompt: str, size: int = 64, limit: int = MAX_PROMPT_BYTES) -> Scene:
    """A scene to be drawn by a policy: the prompt's words and no layout."""
    encode_prompt(prompt, limit)
    return Scene(prompt, quoted_words(prompt), size=size)


def split_of(word: str) -> str:
    """The split that a word belongs to, by hash: 80 % train, 10 % val, 10 % test. Case does not matter."""
    bucket = int.from_bytes(hashlib.sha256(word.upper().encode()).digest()[:4], "big") % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


@functools.cache
def word_list(split: str, max_letters: int) -> tuple[str, ...]:
    """The listed words of a split with 3 to ``max_letters`` letters, in capitals."""
    words = (resources.files("var_env") / "assets" / "words.txt").read_text().split()
    return tuple(word for word in words if 3 <= len(word) <= max_letters and split_of(word) == split)


@functools.cache
def glyph(letter: str, cell: tuple[int, int, int] = Scene.cell) -> np.ndarray:
    """Ink coverage of one glyph cell, given by width, height and font size in pixels: float32 ``(height, width)``."""
    width, height, font_size = cell
    with resources.as_file(resources.files("var_env") / "assets" / "DejaVuSansMono-Bold.ttf") as path:
        font = ImageFont.truetype(str(path), font_size)
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((width / 2, height - 3), letter, fill=255, font=font, anchor="ms")
    return np.asarray(image, np.float32) / 255
