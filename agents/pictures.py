"""Pictures for people: samples in a grid, each with a caption strip below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 160  # px, the least width of a tile
LINE = 15  # px, the height of a caption line


def sample_sheet(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> np.ndarray:
    """Lay out ``(N, S, S, 3)`` uint8 pictures, row by row, over captions of one or more lines: uint8 ``(H, W, 3)``."""
    if len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"need one caption a picture and at least one of them, got {len(images)} and {len(captions)}")
    size = images.shape[1] * max(1, -(-TILE // images.shape[1]))  # a whole multiple keeps pixels square
    lines = max(caption.count("\n") + 1 for caption in captions)
    height, columns = size + lines * LINE + 4, min(columns, len(images))
    sheet = Image.new("RGB", (columns * (size + 4), -(-len(images) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (size + 4), i // columns * height
        sheet.paste(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST), (x, y))
        for row, line in enumerate(caption.split("\n")):
            while line and pen.textlength(line, font=font) > size:
                line = line[:-2] + "…" if line[-1] == "…" else line[:-1] + "…"
            pen.text((x + 2, y + size + row * LINE), line, fill="black", font=font)
    return np.asarray(sheet)


def caption(words: Sequence[str], read: Sequence[str], score: float) -> str:
    """What the prompt asked for, then what was read and its score, on two lines."""
    return f"{' '.join(words)}\n-> {' '.join(read) or '(nothing)'}  {score:+.2f}"
