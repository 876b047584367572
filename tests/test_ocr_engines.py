"""RapidOCR on rendered words, whatever the batch, the threads, the copy or the process."""

import copy
import logging
import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import rewards
from rewards import ocr_engines
from rewards.ocr_engines import RapidOCREngine, get_engine

FONT = Path(__file__).parents[1] / "var_env" / "assets" / "DejaVuSansMono-Bold.ttf"
LAYOUTS = [  # words with the top left corners of their boxes, on cells of 16 x 24 pixels
    [("KITE", 0, 0), ("RUN", 16, 40)],
    [("CAFE", 0, 24)],
    [("UP", 32, 8)],
    [("SHIP", 0, 8), ("BAR", 16, 40)],
    [("XQ", 0, 0), ("VWTK", 0, 40)],
    [("HP", 0, 40)],
]
COLOURS = [((20, 20, 60), (255, 220, 60)), ((250, 250, 250), (90, 10, 20))]  # ground, ink


def render(words, ground=COLOURS[0][0], ink=COLOURS[0][1], size=64, scale=1):
    image = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 26 * scale)
    for word, x, y in words:
        for i, letter in enumerate(word):
            draw.text((scale * (x + 16 * i), scale * (y + 21)), letter, font=font, fill=ink, anchor="ls")
    return np.asarray(image)


def texts(lines_of):
    return [[word for line in lines for word in line.text.split()] for lines in lines_of]


@pytest.fixture(scope="module")
def images():
    return np.stack([render(words, *colours) for words in LAYOUTS for colours in COLOURS])


@pytest.fixture(scope="module")
def engine():
    return get_engine("rapidocr")


def test_it_reads_clear_words(engine, images):
    lines_of = engine.read(images)
    assert texts(lines_of) == [[word for word, _, _ in words] for words in LAYOUTS for _ in COLOURS]
    assert all(0.5 < line.confidence <= 1.0 for lines in lines_of for line in lines)


def test_boxes_lie_around_the_words(engine, images):
    for words, lines in zip(LAYOUTS, engine.read(images[::2]), strict=True):
        for (word, x, y), line in zip(words, lines, strict=True):
            x0, y0, x1, y1 = line.box
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            np.testing.assert_allclose([x0, y0, x1, y1], [x, y, x + 16 * len(word), y + 24], atol=8)


@pytest.mark.parametrize(("size", "scale"), [(128, 1), (128, 2), (256, 1), (256, 4)])
def test_it_reads_larger_images(engine, size, scale):
    image = render(LAYOUTS[0], size=size, scale=scale)
    assert texts(engine.read(image[None])) == [["KITE", "RUN"]]


def test_rapidocr_gets_bgr():
    class Recorder:
        def __call__(self, image):
            self.pixel = image[0, 0].tolist()
            return SimpleNamespace(txts=None)

    engine = RapidOCREngine()
    engine._ocr = recorder = Recorder()
    assert engine.read(render([], ground=(1, 2, 3))[None]) == [[]]
    assert recorder.pixel == [3, 2, 1]


def test_it_reads_images_that_are_not_square(engine):
    tall = np.concatenate([render(LAYOUTS[1]), render(LAYOUTS[2])], axis=0)
    assert texts(engine.read(tall[None])) == [["CAFE", "UP"]]


def test_nothing_is_read_in_empty_images_and_noise(engine):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    plain = np.full((2, 64, 64, 3), 128, np.uint8)
    assert engine.read(np.concatenate([plain, noise])) == [[], [], [], []]
    assert engine.read(np.zeros((1, 16, 300, 3), np.uint8)) == [[]]


def test_a_reading_depends_neither_on_the_batch_nor_on_the_threads(engine, images):
    together = engine.read(images)
    assert engine.read(images) == together
    assert [engine.read(image[None])[0] for image in images] == together
    assert engine.read(images[::-1].copy()) == together[::-1]
    assert get_engine("rapidocr", threads=1).read(images) == together
    assert get_engine("rapidocr", threads=4).read(images) == together


def test_the_text_is_that_of_rapidocrs_defaults(engine, images):
    rapidocr = pytest.importorskip("rapidocr")
    default = rapidocr.RapidOCR(params={"Global.log_level": "critical"})
    for image, lines in zip(images[:4], engine.read(images[:4]), strict=True):
        assert list(default(image[..., ::-1].copy()).txts) == [line.text for line in lines]


def test_images_of_another_form_are_refused(engine, images):
    with pytest.raises(ValueError, match="got dtype float32"):
        engine.read(images.astype(np.float32))


def test_it_is_silent(monkeypatch, images, caplog, capfd):
    monkeypatch.setattr(logging.getLogger("RapidOCR"), "propagate", True)
    RapidOCREngine().read(np.concatenate([images[:1], np.zeros_like(images[:1])]))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_engines_are_shared_and_load_at_the_first_reading():
    assert get_engine("rapidocr") is get_engine("rapidocr", 2)
    lazy = RapidOCREngine()
    assert lazy._ocr is None
    assert copy.deepcopy(lazy) is get_engine("rapidocr")
    assert len(pickle.dumps(lazy)) < 200


def read_in_child(reward, images, scenes, queue):
    queue.put(reward(images, scenes).scores)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reward_works_in_another_process(images, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    reward = rewards.make("ocr")
    scenes = [SimpleNamespace(words=[word for word, _, _ in LAYOUTS[0]])] * 2
    here = reward(images[:2], scenes).scores  # the models are loaded before the fork
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=read_in_child, args=(reward, images[:2], scenes, queue))
    process.start()
    there = queue.get(timeout=60)
    process.join(timeout=60)
    np.testing.assert_array_equal(there, here)
    assert process.exitcode == 0


def test_the_reward_of_real_readings(images):
    scenes = [SimpleNamespace(words=[word for word, _, _ in words]) for words in LAYOUTS for _ in COLOURS]
    output = rewards.make("ocr")(images, scenes)
    assert output.scores.min() > 1.8
    np.testing.assert_array_equal(output.parts["word_accuracy"], np.ones(len(images)))
    wrong = rewards.make("ocr")(images, scenes[::-1])
    assert wrong.scores.max() < 1.5
    blank = rewards.make("ocr")(np.zeros_like(images), scenes)
    np.testing.assert_allclose(blank.scores, -0.6, rtol=1e-6)


def test_an_unknown_engine_and_a_bad_number_of_threads():
    with pytest.raises(ValueError, match="unknown OCR engine 'paddle'; available: rapidocr, paddleocr"):
        get_engine("paddle")
    with pytest.raises(ValueError, match="unknown option 'lang' of OCR engine 'rapidocr'; available: none"):
        get_engine("rapidocr", options={"lang": "en"})
    for threads in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="threads must be a whole number of at least 1"):
            get_engine("rapidocr", threads)


def test_missing_and_broken_models_are_named(monkeypatch, tmp_path, images):
    rapidocr = pytest.importorskip("rapidocr")
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match=r"PP-OCRv6_det_small.onnx, .* is missing; pip install"):
        RapidOCREngine().read(images)
    (tmp_path / "models").mkdir()
    for file in ocr_engines._MODELS.values():
        (tmp_path / "models" / file).write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"cannot load the OCR models in .*; pip install"):
        RapidOCREngine().read(images)
