"""Images for people: samples in a grid, each over its caption, with masks beside them or boxes on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards.components import Component

TILE = 160  # px, the least width of a tile
LINE = 15  # px, the height of a caption line


def sample_sheet(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> np.ndarray:
    """Lay out ``(N, S, S, 3)`` uint8 images, row by row, over captions of one or more lines: uint8 ``(H, W, 3)``."""
    if len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"need one caption an image and at least one of them, got {len(images)} and {len(captions)}")
    size = tile_size(images)
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


def tile_size(images: np.ndarray) -> int:
    """The width of a tile for images ``(N, S, S, 3)``: a whole multiple of S, which keeps pixels square."""
    return images.shape[1] * max(1, -(-TILE // images.shape[1]))


def mask_sheet(
    images: np.ndarray, boxes: Sequence[np.ndarray], captions: Sequence[str], masks: Sequence[np.ndarray]
) -> np.ndarray:
    """Rows of images with their boxes, each row beside its mask at every scale, coarse to fine: uint8 ``(H, W, 3)``.

    Args:
        images: ``(R * K, S, S, 3)`` uint8, the K images of each of R rows side by side.
        boxes: of each image, ``(n, 4)``, xyxy in its pixels, with ``x0 <= x1`` and ``y0 <= y1``; drawn in red.
        captions: of each image.
        masks: one a scale, ``(R, h_t, w_t)`` in [0, 1], which is black to white.
    """
    size, rows = tile_size(images), len(masks[0])
    k = len(images) // rows
    tiles, texts = [], []
    for row in range(rows):
        for i in range(row * k, row * k + k):
            tiles.append(with_boxes(images[i], boxes[i], ["red"] * len(boxes[i]), size))
            texts.append(captions[i])
        for t, mask in enumerate(masks):
            h, w = mask[row].shape
            grey = Image.fromarray(np.rint(mask[row] * 255).astype(np.uint8))
            tile = grey.resize((size, size), Image.Resampling.NEAREST).convert("RGB")
            pen = ImageDraw.Draw(tile)
            for i, j in np.ndindex(h, w):  # the cells' outlines, so that white shows on white paper
                pen.rectangle((j * size // w, i * size // h, size - 1, size - 1), outline="grey")
            tiles.append(tile)
            texts.append(f"scale {t + 1}, {h}x{w}\nkept {mask[row].mean():.2f}")
    return sample_sheet(np.stack([np.asarray(tile) for tile in tiles]), texts, k + len(masks))


def with_boxes(image: np.ndarray, boxes: np.ndarray, colours: Sequence[str], size: int) -> Image.Image:
    """An image ``(S, S, 3)`` enlarged to ``size``, with boxes ``(n, 4)``, xyxy in its own pixels, a colour each."""
    tile = Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(tile)
    for (x0, y0, x1, y1), colour in zip(np.asarray(boxes) * (size / len(image)), colours, strict=True):
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    return tile


def component_boxes(components: Sequence[Component]) -> tuple[np.ndarray, list[str]]:
    """The boxes of an image's components, ``(n, 4)``, and their colours: green where one adds to the score, else red.

    Words are left out, since their letters are there. The largest come first, for a letter that is missing has the
    box of its word and would cover the others.
    """
    shown = [part for part in components if part.boxes is not None and part.kind.split("/")[-1] != "word"]
    found = [(box, "lime" if part.value > 0 else "red") for part in shown for box in np.asarray(part.boxes)]
    found.sort(key=lambda entry: -float((entry[0][2] - entry[0][0]) * (entry[0][3] - entry[0][1])))
    return np.array([box for box, _ in found], np.float32).reshape(-1, 4), [colour for _, colour in found]


def component_sheet(
    images: np.ndarray, components: Sequence[Sequence[Component]], captions: Sequence[str], columns: int = 8
) -> np.ndarray:
    """`sample_sheet` of ``(N, S, S, 3)`` images with the boxes of their components, see `component_boxes`."""
    size = tile_size(images)
    tiles = [with_boxes(image, *component_boxes(found), size) for image, found in zip(images, components, strict=True)]
    return sample_sheet(np.stack([np.asarray(tile) for tile in tiles]), captions, columns)


def caption(words: Sequence[str], read: Sequence[str], score: float) -> str:
    """What the prompt asked for, then what was read and its score, on two lines."""
    return f"{' '.join(words)}\n-> {' '.join(read) or '(nothing)'}  {score:+.2f}"
