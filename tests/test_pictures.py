import numpy as np
import pytest

from agents.common.pictures import component_boxes, component_sheet, mask_sheet, sample_sheet
from rewards.components import Component

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
SIZE, TILE_WIDTH, TILE_HEIGHT = 192, 196, 226  # px: 64-pixel images threefold, and with a gap and two lines of text


def pixel(sheet, row, column, x, y):
    """The colour at a place of a tile, in pixels of the image."""
    return tuple(sheet[row * TILE_HEIGHT + y * 3 + 1, column * TILE_WIDTH + x * 3 + 1].tolist())


@pytest.fixture
def images():
    return np.full((4, 64, 64, 3), 90, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]


def test_mask_sheet_puts_a_rows_images_beside_its_masks(images):
    boxes = [np.array([[8, 16, 40, 48]], np.float32), np.zeros((0, 4), np.float32), np.array([[0, 0, 64, 64]]), []]
    masks = [np.array([[[1.0]], [[0.5]]]), np.array([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])]
    sheet = mask_sheet(images, boxes, ["a\nb"] * 4, masks)
    assert sheet.shape == (2 * TILE_HEIGHT, 4 * TILE_WIDTH, 3) and sheet.dtype == np.uint8
    for i in range(4):
        assert pixel(sheet, i // 2, i % 2, 30, 30) == (90 + i,) * 3
    left = sheet[:TILE_HEIGHT, :TILE_WIDTH]
    ys, xs = np.nonzero((left == RED).all(-1))
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (3 * 8, 3 * 16, 3 * 40 - 1, 3 * 48 - 1)
    assert not (sheet[:TILE_HEIGHT, TILE_WIDTH : 2 * TILE_WIDTH] == RED).all(-1).any()
    assert pixel(sheet, 1, 0, 0, 0) == pixel(sheet, 1, 0, 63, 63) == RED
    assert pixel(sheet, 0, 2, 20, 20) == WHITE and pixel(sheet, 1, 2, 20, 20) == (128,) * 3
    quarters = [(10, 10), (50, 10), (10, 50), (50, 50)]
    assert [pixel(sheet, 0, 3, *at) for at in quarters] == [BLACK, WHITE, BLACK, BLACK]
    assert [pixel(sheet, 1, 3, *at) for at in quarters] == [WHITE, BLACK, BLACK, BLACK]


def test_mask_sheet_outlines_cells_and_draws_slivers(images):
    sliver = np.array([[63.9, 0, 64, 64], [5, 5, 5.1, 5.1]], np.float32)
    sheet = mask_sheet(images[:1], [sliver], ["a\nb"], [np.ones((1, 2, 3))])
    tile = sheet[:SIZE, TILE_WIDTH : TILE_WIDTH + SIZE]
    grey = (tile == 128).all(-1)
    assert np.flatnonzero(grey.all(0)).tolist() == [0, 64, 128, 191]
    assert np.flatnonzero(grey.all(1)).tolist() == [0, 96, 191]
    assert (sheet[:SIZE, SIZE - 1] == RED).all()


def test_sample_sheet_wants_a_caption_an_image(images):
    with pytest.raises(ValueError, match="4 and 3"):
        sample_sheet(images, ["a"] * 3)


def letter(kind, value, *boxes):
    return Component(kind, (0, 0), value, np.array(boxes, np.float32).reshape(-1, 4) if boxes else None)


def test_boxes_of_components():
    """Large ones first, words left out, also those of a mixture; a part of several boxes has them all."""
    parts = [
        letter("letter", 0.2, [0, 0, 8, 8]),
        letter("letter", 0.0, [8, 0, 16, 8]),
        letter("letter", 0.0, [0, 0, 32, 8]),  # left out of the word that stands there
        letter("letter", 0.2),
        letter("spurious", -0.1, [24, 0, 31, 8]),
        letter("word", 0.5, [0, 0, 32, 8]),
        letter("ocr/word", 0.5, [0, 0, 32, 8]),
        letter("clause", 1.0, [0, 9, 1, 10], [4, 9, 5, 10]),
    ]
    boxes, colours = component_boxes(parts)
    assert boxes[:, 0].tolist() == [0, 0, 8, 24, 0, 4]
    assert colours == ["red", "lime", "red", "red", "lime", "lime"]
    boxes, colours = component_boxes([])
    assert boxes.shape == (0, 4) and colours == []


def test_component_sheet(images):
    components = [[letter("letter", 0.5, [8, 16, 16, 32]), letter("letter", 0.0, [16, 16, 24, 32])], [], [], []]
    sheet = component_sheet(images, components, ["a\nb"] * 4, columns=2)
    assert sheet.shape == (2 * TILE_HEIGHT, 2 * TILE_WIDTH, 3)
    assert pixel(sheet, 0, 0, 8, 16) == GREEN and pixel(sheet, 0, 0, 16, 16) == RED
    assert pixel(sheet, 0, 0, 12, 24) == (90, 90, 90)
    for colour, left in ((GREEN, 8), (RED, 16)):
        ys, xs = np.nonzero((sheet[:, :TILE_WIDTH] == colour).all(-1))
        assert (xs.min(), ys.min(), xs.max(), ys.max()) == (3 * left, 3 * 16, 3 * (left + 8) - 1, 3 * 32 - 1)
    assert not any((sheet[:, TILE_WIDTH:] == colour).all(-1).any() for colour in (RED, GREEN))
