"""What an image has of what its prompt asks for, beside the reward: letters, words, lines, ink, ground and contrast.

A reward sees what it measures and nothing else. OCR gives the full score to black on white whatever colours the prompt
names, and a mean over words hides which fault is left. The functions here are pure and cheap, and are meant to be
logged beside any reward:

- Letters and words come from the words that the reward read, and from no second reader. A word asked for that has no
  counterpart is *missing*, and its letters are counted nowhere else, so that no fault is counted in two families.
- Colours come from the pixels: the ground is the median of the border, the ink the mean of the pixels that are farthest
  from it. Each is named after the nearest colour of the palette.

What cannot be told is NaN: letters and words where the reward does not read, colours where the prompt names none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.alignment import counterparts, pair_letters
from rewards.base import check_images
from rewards.text_metrics import normalize
from var_env.faults import COLOURS, Faults
from var_env.scenes import TEMPLATES, Scene

INK_PIXELS = 48  # as many pixels of full coverage have the thinnest words
INK_DISTANCE = 32.0  # RGB levels between ink and ground; below it there is texture and no ink
LINE_ROWS = 4  # px; a lower run of rows with ink is no line of text
MAX_SIDE = 256  # px; larger images are strided down to about this
NAMES = tuple(COLOURS)
VALUES = np.array(list(COLOURS.values()), np.float32)  # (8, 3)
ASKED = tuple(
    re.compile(re.escape(template).replace(r"\{words\}", ".*").replace(r"\{", "(?P<").replace(r"\}", r">\w+)"))
    for template in TEMPLATES
)

Record = dict[str, NDArray[np.float32]]


def attributes(
    images: NDArray[np.uint8], scenes: Sequence[Scene], words_read: Sequence[Sequence[str]] | None, faults: Faults
) -> Record:
    """What each of B images has of what its scene asks for.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        scenes: B scenes as they were asked for.
        words_read: per image the words that the reward read; None for a reward that does not read.
        faults: the table that says which letters, pairs of words and inks are affected, and as what they are drawn.

    Returns:
        Arrays (B,) float32. Counts, NaN where the reward does not read:

        - letters_affected, affected_right, affected_confused (read as the partner of the table), affected_other; and
          letters_plain, plain_right, plain_other for letters that the table does not name. Letters of words that are
          not missing.
        - words_asked; words_shown, as many as were read; words_missing, of those asked for.
        - pairs_affected: 1 where two words are asked for on a ground whose lower words may be left out.

        Of the pixels:

        - lines_shown: runs of rows with ink.
        - ink_right, ground_right: 1 where the colour asked for is the palette's nearest one, else 0; NaN where the
          prompt names none. ink_affected: 1 where the ink asked for is in the table; ink_confused: 1 where the
          ink is the partner.
        - contrast of ink and ground, the ratio of WCAG 2 in 1 to 21, where 1 is none.

    Raises:
        ValueError: images that are no uint8 (B, H, W, 3), or as many scenes or words as there are not images.
    """
    check_batch(images, scenes, words_read)
    return text_attributes(scenes, words_read, faults) | colour_attributes(images, scenes, faults)


def check_batch(images: NDArray[np.uint8], scenes: Sequence[Scene], words_read: Sequence[Sequence[str]] | None) -> None:
    """``ValueError`` for images that are none, or as many scenes or words as there are not images."""
    check_images(images)
    if len(scenes) != len(images) or (words_read is not None and len(words_read) != len(images)):
        raise ValueError(
            f"got {len(images)} images, {len(scenes)} scenes and words read of "
            f"{'no' if words_read is None else len(words_read)} images; give one of each an image"
        )


# Letters and words ---------------------------------------------------------------------------------------------------

TEXT = (
    "letters_affected", "affected_right", "affected_confused", "affected_other",
    "letters_plain", "plain_right", "plain_other",
    "words_asked", "words_shown", "words_missing", "pairs_affected",
)  # fmt: skip


def text_attributes(
    scenes: Sequence[Scene],
    words_read: Sequence[Sequence[str]] | None,
    faults: Faults,
    grounds: Sequence[str | None] | None = None,
) -> Record:
    """The attributes that come from the words read, see `attributes`.

    Args:
        scenes, words_read, faults: as there.
        grounds: the names of the grounds' colours asked for; by default those of `colours_asked`.
    """
    if words_read is None:
        return {name: np.full(len(scenes), np.nan, np.float32) for name in TEXT}
    partners = {normalize(first): normalize(second) for first, (second, _) in faults.letters.items()}
    counts = np.zeros((len(TEXT), len(scenes)), np.float32)
    rows = dict(zip(TEXT, counts, strict=True))
    for i, (scene, read) in enumerate(zip(scenes, words_read, strict=True)):
        words = [normalize(word) for text in scene.words for word in text.split()]
        found = counterparts(words, [normalize(word) for word in read])
        for word, shown in zip(words, found, strict=True):
            if shown is not None:
                for letter, fate in zip(word, letter_fates(word, shown, partners), strict=True):
                    kind = "affected" if letter in partners else "plain"
                    rows[f"letters_{kind}"][i] += 1
                    rows[f"{kind}_{fate}"][i] += 1
        rows["words_asked"][i], rows["words_shown"][i] = len(words), len(read)
        rows["words_missing"][i] = found.count(None)
        ground = colours_asked(scene)[1] if grounds is None else grounds[i]
        rows["pairs_affected"][i] = faults.may_miss(len(words), ground)
    return rows


def letter_fates(word: str, shown: str, partners: Mapping[str, str]) -> list[str]:
    """For each letter of a word "right", "confused" (shown as its partner) or "other" (another letter, or none)."""
    at, _ = pair_letters(word, shown)

    def fate(letter: str, j: int | None) -> str:
        if j is None:
            return "other"
        return "right" if shown[j] == letter else "confused" if partners.get(letter) == shown[j] else "other"

    return [fate(letter, j) for letter, j in zip(word, at, strict=True)]


# Colours -------------------------------------------------------------------------------------------------------------


def colour_attributes(images: NDArray[np.uint8], scenes: Sequence[Scene], faults: Faults) -> Record:
    """The attributes that come from the pixels, see `attributes`."""
    step = max(1, max(images.shape[1:3]) // MAX_SIDE)
    pixels = images[:, ::step, ::step].astype(np.float32)  # (B, H, W, 3)
    ground, ink = ink_and_ground(pixels)
    visible = np.linalg.norm(ink - ground, axis=1) >= INK_DISTANCE  # (B,)
    inks = [name if seen else None for name, seen in zip(nearest_colours(ink), visible, strict=True)]
    grounds = nearest_colours(ground)
    asked = [colours_asked(scene) for scene in scenes]
    partners = {first: second for first, (second, _) in faults.colours.items()}
    return {
        "lines_shown": np.where(visible, count_lines(pixels, ground, ink), 0).astype(np.float32),
        "ink_affected": flags(None if i is None else i in partners for i, _ in asked),
        "ink_right": flags(None if i is None else i == shown for (i, _), shown in zip(asked, inks, strict=True)),
        "ink_confused": flags(
            None if i is None else i in partners and partners[i] == shown
            for (i, _), shown in zip(asked, inks, strict=True)
        ),
        "ground_right": flags(None if g is None else g == shown for (_, g), shown in zip(asked, grounds, strict=True)),
        "contrast": contrast_ratio(ink, ground),
    }


def flags(values: Iterable[bool | None]) -> NDArray[np.float32]:
    """1 and 0, and NaN for ``None``: (B,)."""
    return np.array([np.nan if value is None else value for value in values], np.float32)


def colours_asked(scene: Scene) -> tuple[str | None, str | None]:
    """The names of the ink and the ground that a scene asks for, None where it asks for none of the palette.

    A scene that was drawn knows them; one that was made from its prompt alone has what the prompt says.
    """
    if scene.boxes:
        known = {value: name for name, value in COLOURS.items()}
        return known.get(scene.ink), known.get(scene.ground)
    for template in ASKED:
        match = template.fullmatch(scene.prompt)
        if match:
            ink, ground = match["ink"], match["ground"]
            return ink if ink in COLOURS else None, ground if ground in COLOURS else None
    return None, None


def ink_and_ground(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The ground's and the ink's colour, each (B, 3) in 0 to 255, of images (B, H, W, 3).

    The ink is the mean of the pixels whose distance to the ground is at least 0.8 of that of the farthest
    `INK_PIXELS`, which leaves out the blended rims of the strokes. A blank image has the ground's own colour.
    """
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)  # (B, 2 H + 2 W, 3)
    ground = np.median(border, 1)  # (B, 3)
    return ground, ink_on(pixels, ground[:, None, None])[0]


def ink_on(pixels: NDArray[np.float32], ground: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The ink's colour (B, 3) on a ground that fits the images (B, H, W, 3), see `ink_and_ground`.

    With it the squared distance of the farthest `INK_PIXELS` from the ground, (B,).
    """
    flat = pixels.reshape(len(pixels), -1, 3)  # (B, H W, 3)
    apart = (pixels - ground).reshape(flat.shape)
    squared = np.einsum("bpc,bpc->bp", apart, apart)  # (B, H W)
    farthest = np.partition(squared, -INK_PIXELS, axis=1)[:, -INK_PIXELS]  # (B,)
    chosen = (squared >= 0.8**2 * farthest[:, None]).astype(np.float32)
    return (chosen[:, None] @ flat)[:, 0] / chosen.sum(1, keepdims=True), farthest


def count_lines(
    pixels: NDArray[np.float32], ground: NDArray[np.float32], ink: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Runs of at least `LINE_ROWS` rows in which two pixels or more are nearer to the ink than to the ground: (B,)."""
    axis = ink - ground  # (B, 3)
    middle = ((ink + ground) * axis).sum(1)[:, None, None] / 2
    along = (pixels.reshape(len(pixels), -1, 3) @ axis[:, :, None]).reshape(pixels.shape[:3])  # (B, H, W)
    return count_runs(along > middle)


def count_runs(near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The same from which pixels (B, H, W) are nearer to the ink: (B,)."""
    rows = near.sum(2) >= 2  # (B, H)
    padded = np.pad(rows, ((0, 0), (LINE_ROWS, LINE_ROWS)))
    last = padded[:, :-1] & ~padded[:, 1:]  # the last row of a run
    long = np.logical_and.reduce([padded[:, LINE_ROWS - 1 - k : padded.shape[1] - 1 - k] for k in range(LINE_ROWS)])
    return (last[:, LINE_ROWS - 1 :] & long).sum(1)


def nearest_colours(rgb: NDArray[np.float32]) -> list[str]:
    """The palette's name nearest to each of (B, 3) colours, by distance in RGB."""
    return [NAMES[i] for i in ((rgb[:, None] - VALUES) ** 2).sum(2).argmin(1)]


def contrast_ratio(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The contrast ratio of WCAG 2 of colours (B, 3) in sRGB, 0 to 255: (B,) from 1 to 21."""
    levels = np.stack([first, second]) / 255  # (2, B, 3)
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])  # (2, B)
    return ((luminance.max(0) + 0.05) / (luminance.min(0) + 0.05)).astype(np.float32)


# Families and shares -------------------------------------------------------------------------------------------------


def chances(record: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Of each family of faults, how often it could show in each image and how often the right thing stood there.

    Letters are counted one by one, pairs of words and inks one an image. Only what is right counts: a letter that has
    become illegible instead of its partner, or an image without words, is not repaired.

    Returns:
        By family (2, ...): chances and those that are right. What is not applicable counts as no chance. The families
        are those of the record's world: of the room's, "ground" in place of "colour".
    """
    pairs = {
        "letter": (record["letters_affected"], record["affected_right"]),
        "missing": (record["pairs_affected"], record["pairs_affected"] * (record["words_missing"] == 0)),
        "colour": (record["ink_affected"], record["ink_affected"] * record["ink_right"]),
    }
    if "pattern_affected" in record:  # a world whose inks have no fault, and whose grounds have
        del pairs["colour"]
        pairs["ground"] = (record["pattern_affected"], record["pattern_affected"] * record["pattern_right"])
    return {family: np.nan_to_num(np.stack(pair)) for family, pair in pairs.items()}


def shares(record: Mapping[str, NDArray[np.float32]]) -> dict[str, float]:
    """What is logged of a record: one number each, NaN where nothing in it is applicable.

    Shares of the letters, words and images in question, in 0 to 1; lines_shown and contrast are means. words_extra is
    the share of images that show a word which is no counterpart of any that was asked for.
    """
    totals = {name: float(np.nansum(values)) for name, values in record.items()}
    known = {name: float(np.isfinite(values).sum()) for name, values in record.items()}

    def share(part: str, whole: float) -> float:
        return totals[part] / whole if whole else float("nan")

    found: dict[str, float] = {}
    for kind, fates in {"affected": ("confused", "other"), "plain": ("right", "other")}.items():
        found |= {f"{kind}_{fate}": share(f"{kind}_{fate}", totals[f"letters_{kind}"]) for fate in fates}
    found["words_missing"] = share("words_missing", totals["words_asked"])
    # A reward that gives more for a second word than it takes for one too many teaches to write two always.
    extra = record["words_shown"] > record["words_asked"] - record["words_missing"]  # (B,), False where NaN
    found["words_extra"] = float(extra.sum() / known["words_shown"]) if known["words_shown"] else float("nan")
    of_pixels = ("ink_right", "ground_right", "lines_shown", "contrast", "pattern_right", "second_right")
    found |= {name: share(name, known[name]) for name in of_pixels if name in record}
    for family, (n, right) in chances(record).items():
        found[f"{family}_right"] = float(right.sum() / n.sum()) if n.sum() else float("nan")
    return found
