"""OCR engines: from images to lines of text with confidences and boxes.

`RapidOCREngine` runs the PP-OCR detection and recognition models that the rapidocr wheel bundles, on the CPU
and offline; `paddle_engine` runs PaddleOCR. To add an engine, write a class with `read` and enter it in `ENGINES`.
"""

import inspect
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rewards.base import check_images

# The models by name, not RapidOCR's defaults: another model would be another reward, and perhaps a download.
_MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
_INSTALL = "pip install --force-reinstall 'rapidocr==3.10.*' onnxruntime"

# Detection runs at an image's own size, enlarged to 96 pixels if it is smaller (RapidOCR's default is 736);
# recognition at a line's own width (default: padded to 320); no rotation classifier. On clear 64x64 images
# the text is that of the defaults. More than one intra-op thread spins and slows the others down.
_SETTINGS: dict[str, Any] = {
    "Global.text_score": 0.0,
    "Global.use_cls": False,
    "Global.log_level": "critical",
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,
    "Det.limit_type": "min",
    "Det.limit_side_len": 96,
    "Rec.rec_img_shape": [3, 48, 48],
    "Rec.rec_batch_num": 1,
}


class TextLine(NamedTuple):
    """One line of text found in an image."""

    text: str  # not blank; may hold several words
    confidence: float  # in [0, 1]
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the image


class Engine(Protocol):
    """What the OCR reward needs of an engine."""

    def read(self, images: NDArray[np.uint8]) -> list[list[TextLine]]:
        """The lines of text in each of the (B, H, W, 3) uint8 RGB images, in reading order."""

    def describe(self) -> dict[str, str]:
        """The engine's version and the names of its models."""


class RapidOCREngine:
    """PP-OCRv6 (small) through RapidOCR and onnxruntime. The models load on the first `read`.

    Each image is read by itself: the text depends neither on the rest of the batch nor on the number of
    threads. A line that OCR is unsure of is kept, with its low confidence.

    Args:
        threads: how many images are read at a time, by Python threads that share one instance of the models.
    """

    def __init__(self, threads: int = 2) -> None:
        self.threads = check_threads(threads)
        self._ocr: Any = None
        self._loading = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return get_engine, ("rapidocr", self.threads)  # a copy is the shared engine, a pickle its name

    def read(self, images: NDArray[np.uint8]) -> list[list[TextLine]]:
        """The lines of text in each of the (B, H, W, 3) uint8 RGB images; ValueError for anything else."""
        check_images(images)
        with self._loading:
            if self._ocr is None:
                self._ocr = _load()
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read_one, images))

    def describe(self) -> dict[str, str]:
        """RapidOCR's version, and the files of the models for detection and recognition."""
        return {"rapidocr": metadata.version("rapidocr"), "det": _MODELS["Det"], "rec": _MODELS["Rec"]}

    def _read_one(self, image: NDArray[np.uint8]) -> list[TextLine]:
        result = self._ocr(np.ascontiguousarray(image[..., ::-1]))  # RapidOCR takes arrays as BGR
        if result.txts is None:
            return []
        corners = np.asarray(result.boxes, dtype=np.float64)  # (n, 4, 2)
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)  # (n, 4)
        return [
            TextLine(text, float(score), tuple(box))
            for text, score, box in zip(result.txts, result.scores, boxes.tolist(), strict=True)
        ]


def _load() -> Any:
    """A RapidOCR instance with both models open. Errors say what is missing or broken, and the remedy."""
    try:
        import rapidocr
    except ImportError as error:
        raise ImportError(f"the OCR reward needs RapidOCR and onnxruntime ({error}); {_INSTALL}") from error
    folder = Path(rapidocr.__file__).parent / "models"
    params = dict(_SETTINGS)
    for stage, file in _MODELS.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}, which defines the OCR reward, is missing; {_INSTALL}")
        params[f"{stage}.model_path"] = str(folder / file)
    blank = np.zeros((96, 96, 3), np.uint8)
    try:
        ocr = rapidocr.RapidOCR(params=params)
        ocr(blank, use_det=False, use_rec=True)  # RapidOCR opens a model at its first use
        ocr(blank, use_det=True, use_rec=True)  # and remembers these flags: the last call leaves both on
    except Exception as error:
        raise RuntimeError(f"cannot load the OCR models in {folder} ({error}); {_INSTALL}") from error
    return ocr


def check_threads(threads: int) -> int:
    """`threads`, or ValueError unless it is a whole number of at least 1."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a whole number of at least 1, got {threads!r}")
    return threads


ENGINES = {  # name: module and class, imported when asked for
    "rapidocr": "rewards.ocr_engines:RapidOCREngine",
    "paddleocr": "rewards.paddle_engine:PaddleOCREngine",
}
_shared: dict[tuple[str, int, str], Engine] = {}


def get_engine(name: str, threads: int = 2, options: Mapping[str, Any] | None = None) -> Engine:
    """The engine called `name`: one object a process for each name, number of threads and options.

    Args:
        name: one of `ENGINES`.
        threads: how many images it reads at a time.
        options: the engine's own keyword arguments; see its class.

    Raises:
        ValueError: for an unknown name or option, listing those that exist.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown OCR engine {name!r}; available: {', '.join(ENGINES)}")
    module, _, cls = ENGINES[name].partition(":")
    engine = getattr(import_module(module), cls)
    options = dict(options or {})
    known = [option for option in inspect.signature(engine).parameters if option != "threads"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        there = ", ".join(known) or "none"
        raise ValueError(f"unknown option {unknown[0]!r} of OCR engine {name!r}; available: {there}")
    key = (name, threads, repr(sorted(options.items())))
    return _shared.setdefault(key, engine(threads=threads, **options))
