"""The PaddleOCR engine. What needs PaddleOCR itself runs by `make test-paddle`, in an environment of its own."""

import copy
import importlib.util
import json
import pickle
import sys

import gymnasium as gym
import numpy as np
import pytest

import rewards
import var_env  # noqa: F401  registers VARText-v0
from rewards.ocr_engines import get_engine
from rewards.paddle_engine import PaddleOCREngine
from rewards.text_metrics import normalize
from var_env.scenes import World, render

LIKE_RAPIDOCR = {"limit_side_len": 96, "box_thresh": 0.5, "unclip_ratio": 1.6}

needs_paddleocr = pytest.mark.skipif(
    importlib.util.find_spec("paddleocr") is None,
    reason="PaddleOCR needs an environment of its own: run `make test-paddle`",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from paddle_models import save_paddle_models

    det, rec = save_paddle_models(tmp_path_factory.mktemp("paddle"))
    return {"det_dir": det, "rec_dir": rec}


@pytest.fixture(scope="module")
def engine(folders):
    return get_engine("paddleocr", options={**folders, **LIKE_RAPIDOCR})


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [World().sample(rng) for _ in range(64)]


@pytest.fixture(scope="module")
def images(scenes):
    return np.stack([render(scene) for scene in scenes])


def texts(lines_of):
    return [[word for line in lines for word in line.text.split()] for lines in lines_of]


# --- without PaddleOCR


def test_bad_options():
    for options, message in [
        ({"models": 1}, "unknown option 'models' of OCR engine 'paddleocr'; available: ocr_version, lang, det_dir"),
        ({"ocr_version": "v5"}, "unknown ocr_version 'v5'; available: PP-OCRv5, PP-OCRv6"),
        ({"det_dir": "a"}, "give both of det_dir and rec_dir, or neither; got 'a' and None"),
        ({"det_dir": "a", "rec_dir": "b", "lang": "en"}, r"lang \('en'\) chooses among PaddleOCR's own models"),
        ({"limit_side_len": 8}, "limit_side_len must be at least 32 pixels, got 8"),
        ({"box_thresh": 0}, r"box_thresh must lie in \(0, 1\], got 0"),
        ({"unclip_ratio": float("nan")}, "unclip_ratio must be a positive number, got nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            rewards.make("ocr", engine="paddleocr", engine_kwargs=options)
    with pytest.raises(ValueError, match="threads must be a whole number of at least 1"):
        PaddleOCREngine(threads=0)


def test_engines_are_shared_by_their_options_and_load_at_the_first_reading():
    options = {"ocr_version": "PP-OCRv5", "lang": "en"}
    reward = rewards.make("ocr", engine="paddleocr", engine_kwargs=json.loads(json.dumps(options)))
    assert reward.engine is rewards.make("ocr_edit", engine="paddleocr", engine_kwargs=options).engine
    assert reward.engine is not rewards.make("ocr", engine="paddleocr").engine
    assert reward.engine is not rewards.make("ocr", engine="paddleocr", engine_kwargs=options, threads=1).engine
    assert copy.deepcopy(reward).engine is reward.engine
    assert pickle.loads(pickle.dumps(reward)).engine is reward.engine
    assert reward.engine._idle is None


def test_missing_files_are_named(tmp_path):
    pytest.importorskip("yaml")
    engine = PaddleOCREngine(det_dir=str(tmp_path / "det"), rec_dir=str(tmp_path / "rec"), ocr_version="PP-OCRv5")
    with pytest.raises(FileNotFoundError, match=r"det/inference.onnx is missing; a model's directory holds"):
        engine.load()
    for stage in ("det", "rec"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "inference.onnx").write_bytes(b"not a model")
    with pytest.raises(FileNotFoundError, match=r"det/inference.yml is missing"):
        engine.load()
    (tmp_path / "det" / "inference.yml").write_text("PreProcess: {}")
    with pytest.raises(ValueError, match=r"det/inference.yml does not name its model: it lacks Global.model_name"):
        engine.load()
    (tmp_path / "det" / "inference.yml").write_text("Global: {model_name: PP-OCRv6_small_det}")
    with pytest.raises(ValueError, match=r"ocr_version is 'PP-OCRv5', but .*det holds the model 'PP-OCRv6_small_det'"):
        engine.load()


def test_without_paddleocr_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(ImportError, match=r'pip install "vartext\[paddle\]", into a virtual environment of its own'):
        PaddleOCREngine().read(np.zeros((1, 64, 64, 3), np.uint8))


# --- with PaddleOCR


@needs_paddleocr
def test_both_engines_read_the_same_words(engine, images):
    ours, theirs = texts(engine.read(images)), texts(get_engine("rapidocr").read(images))
    # PaddleOCR's boxes may end at the image's edge, RapidOCR's one pixel before it. Where a word reaches the edge,
    # that changes the crop by a pixel, and with it the case of an X or a V in one of the 64 images.
    assert sum(mine != other for mine, other in zip(ours, theirs, strict=True)) <= 1
    assert [[normalize(word) for word in words] for words in ours] == [
        [normalize(word) for word in words] for words in theirs
    ]


@needs_paddleocr
def test_both_engines_agree_in_all_where_no_word_reaches_the_edge(engine, images):
    images = np.pad(images, ((0, 0), (16, 16), (16, 16), (0, 0)), mode="edge")
    for ours, theirs in zip(engine.read(images), get_engine("rapidocr").read(images), strict=True):
        assert [line.text for line in ours] == [line.text for line in theirs]
        assert [line.box for line in ours] == [line.box for line in theirs]
        for line, other in zip(ours, theirs, strict=True):
            # PaddleOCR crops the least rectangle around a line, RapidOCR its four corners: nearly the same.
            assert line.confidence == pytest.approx(other.confidence, abs=0.01)


@needs_paddleocr
def test_confidences_and_boxes(engine, images):
    for lines in engine.read(images):
        for text, confidence, (x0, y0, x1, y1) in lines:
            assert text.strip()
            assert type(confidence) is float and 0.0 <= confidence <= 1.0
            assert type(x0) is float and 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64


@needs_paddleocr
def test_a_reading_depends_neither_on_the_batch_nor_on_the_threads(engine, folders, images):
    images = images[:8]
    together = engine.read(images)
    assert engine.read(images[::-1].copy()) == together[::-1]
    for threads in (1, 4):
        assert get_engine("paddleocr", threads, {**folders, **LIKE_RAPIDOCR}).read(images) == together


@needs_paddleocr
def test_nothing_is_read_in_empty_images(engine, images):
    assert engine.read(np.full_like(images[:2], 128)) == [[], []]
    with pytest.raises(ValueError, match="got dtype float32"):
        engine.read(images[:1].astype(np.float32))


@needs_paddleocr
def test_paddleocrs_own_settings_read_the_words_too(folders, scenes, images):
    reward = rewards.make("ocr", engine="paddleocr", engine_kwargs=folders)
    assert reward(images, scenes).parts["word_accuracy"].mean() > 0.9


@needs_paddleocr
def test_the_engine_says_which_models_ran(folders):
    options = {**folders, "ocr_version": "PP-OCRv6"}
    described = get_engine("paddleocr", options=options).describe()
    assert described.pop("paddleocr").startswith("3.7")
    assert described == {"det": "PP-OCRv6_small_det", "rec": "PP-OCRv6_small_rec"}


@needs_paddleocr
def test_it_is_silent(folders, images, capfd):
    PaddleOCREngine(**folders).read(images[:1])
    assert capfd.readouterr() == ("", "")


@needs_paddleocr
def test_broken_models_are_named(tmp_path, images):
    for stage in ("det", "rec"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "inference.onnx").write_bytes(b"not a model")
        (tmp_path / stage / "inference.yml").write_text(f"Global: {{model_name: PP-OCRv6_small_{stage}}}")
    engine = PaddleOCREngine(det_dir=str(tmp_path / "det"), rec_dir=str(tmp_path / "rec"))
    with pytest.raises(RuntimeError, match=r"cannot load PaddleOCR's models in .*det and .*rec: "):
        engine.read(images[:1])


@needs_paddleocr
def test_an_episode(folders):
    env = gym.make("VARText-v0", reward="ocr", reward_kwargs={"engine": "paddleocr", "engine_kwargs": folders})
    env.reset(seed=0)
    env.action_space.seed(0)
    terminated = False
    while not terminated:
        _, score, terminated, _, info = env.step(env.action_space.sample())
    assert score == info["score"]
    assert -0.6 - 1e-6 <= score <= 2.0
