"""PaddleOCR as an OCR engine: the one that *VAR RL Done Right* (section 4.2.1), STAGE and Flow-GRPO score with.

It runs on onnxruntime and needs no paddlepaddle. With a network it fetches PaddleOCR's own models; without, it runs
on local model directories. PaddleOCR wants an older numpy and OpenCV than the rest of VARText, so install it into an
environment of its own.
"""

import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards.base import check_images
from rewards.ocr_engines import TextLine, check_threads, get_engine
from rewards.reason import reason

VERSIONS = ("PP-OCRv5", "PP-OCRv6")  # those that PaddleOCR offers for onnxruntime
_INSTALL = (
    'pip install "vartext[paddle]", into a virtual environment of its own: PaddleOCR needs numpy < 2.4 and OpenCV 4.10'
)
_LOCAL = (
    "they are fetched at the first use; without a network, give local models by "
    'engine_kwargs={"det_dir": ..., "rec_dir": ...}'
)
_FILES = ("inference.onnx", "inference.yml")  # what PaddleOCR looks for in a model's directory


class PaddleOCREngine:
    """PaddleOCR 3.7 on the CPU, through onnxruntime. The models load on the first `read`.

    Each image is read by itself, and each line of it too: the text depends neither on the rest of the batch nor on
    the number of threads. A line that OCR is unsure of is kept, with its low confidence.

    Args:
        threads: how many images are read at a time. Each has its own instance of the models.
        ocr_version: one of `VERSIONS`, of PaddleOCR's own models. PP-OCRv5, the paper's, unless directories are given;
            then their models must be of this version, when it is named.
        lang: PaddleOCR's name of a language. By default its models for Chinese and English, which are the largest;
            "en" are small ones for English. Not with directories.
        det_dir, rec_dir: local directories of a detection and a recognition model, each with inference.onnx and
            inference.yml. Both or neither.
        limit_side_len: detection enlarges an image until its shorter side has as many pixels. By default
            PaddleOCR's 64; RapidOCREngine has 96.
        box_thresh: the least detection score of a line, in (0, 1]. By default PaddleOCR's 0.6; RapidOCREngine has 0.5.
        unclip_ratio: how far a line's box reaches beyond its detected core. By default PaddleOCR's 1.5;
            RapidOCREngine has 1.6.
    """

    def __init__(
        self,
        threads: int = 2,
        ocr_version: str | None = None,
        lang: str | None = None,
        det_dir: str | None = None,
        rec_dir: str | None = None,
        limit_side_len: int | None = None,
        box_thresh: float | None = None,
        unclip_ratio: float | None = None,
    ) -> None:
        self.threads = check_threads(threads)
        if ocr_version is not None and ocr_version not in VERSIONS:
            raise ValueError(f"unknown ocr_version {ocr_version!r}; available: {', '.join(VERSIONS)}")
        if (det_dir is None) != (rec_dir is None):
            raise ValueError(f"give both of det_dir and rec_dir, or neither; got {det_dir!r} and {rec_dir!r}")
        if det_dir is not None and lang is not None:
            raise ValueError(f"lang ({lang!r}) chooses among PaddleOCR's own models; leave it out with det_dir")
        if limit_side_len is not None and limit_side_len < 32:
            raise ValueError(f"limit_side_len must be at least 32 pixels, got {limit_side_len}")
        if box_thresh is not None and not 0 < box_thresh <= 1:  # PaddleOCR takes 0 for its default
            raise ValueError(f"box_thresh must lie in (0, 1], got {box_thresh}")
        if unclip_ratio is not None and not 0 < unclip_ratio < float("inf"):
            raise ValueError(f"unclip_ratio must be a positive number, got {unclip_ratio}")
        self.options = {
            "ocr_version": ocr_version,
            "lang": lang,
            "det_dir": det_dir,
            "rec_dir": rec_dir,
            "limit_side_len": limit_side_len,
            "box_thresh": box_thresh,
            "unclip_ratio": unclip_ratio,
        }
        self._idle: queue.SimpleQueue[Any] | None = None  # PaddleOCR's pipelines are not made to be shared by threads
        self._models: dict[str, str] = {}
        self._loading = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        given = {name: value for name, value in self.options.items() if value is not None}
        return get_engine, ("paddleocr", self.threads, given)  # a copy is the shared engine, a pickle its options

    def load(self) -> None:
        """Load the models now.

        Raises:
            ImportError: PaddleOCR is not installed.
            FileNotFoundError: a model's directory, or a file in it, is missing.
            ValueError: local models of another version than `ocr_version`.
            RuntimeError: the models cannot be fetched or opened.
        """
        with self._loading:
            if self._idle is None:
                pipelines = [_load(self.options) for _ in range(self.threads)]
                self._models = _describe(pipelines[0])
                self._idle = queue.SimpleQueue()
                for pipeline in pipelines:
                    self._idle.put(pipeline)

    def describe(self) -> dict[str, str]:
        """What reads: paddleocr's version, and the names of the models `det` and `rec`. Loads them."""
        self.load()
        return dict(self._models)

    def read(self, images: NDArray[np.uint8]) -> list[list[TextLine]]:
        """The lines of text in each of the (B, H, W, 3) uint8 RGB images, in reading order.

        Raises ValueError for images of another form, and what `load` raises.
        """
        check_images(images)
        self.load()
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read_one, images))

    def _read_one(self, image: NDArray[np.uint8]) -> list[TextLine]:
        assert self._idle is not None
        pipeline = self._idle.get()
        try:
            (result,) = pipeline.predict(np.ascontiguousarray(image[..., ::-1]))  # PaddleOCR takes arrays as BGR
        finally:
            self._idle.put(pipeline)
        boxes = np.asarray(result["rec_boxes"], dtype=np.float64).reshape(-1, 4)
        return [
            TextLine(text, min(float(score), 1.0), (x0, y0, x1, y1))  # a mean of float32 may exceed 1 by a rounding
            for text, score, (x0, y0, x1, y1) in zip(
                result["rec_texts"], result["rec_scores"], boxes.tolist(), strict=True
            )
            if text.strip()
        ]


def _load(options: dict[str, Any]) -> Any:
    """A PaddleOCR pipeline with both models open."""
    models: dict[str, Any]
    if options["det_dir"] is None:
        models = {"ocr_version": options["ocr_version"] or "PP-OCRv5", "lang": options["lang"]}
    else:
        models = {}
        for stage, key in (("detection", "det_dir"), ("recognition", "rec_dir")):
            models[f"text_{stage}_model_dir"] = options[key]
            models[f"text_{stage}_model_name"] = _model_name(Path(options[key]), options["ocr_version"])
    try:
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ImportError(f"the OCR engine 'paddleocr' needs PaddleOCR ({error}); {_INSTALL}") from error
    logging.getLogger("paddlex").setLevel(logging.WARNING)  # else it reports each model that it opens
    try:
        return PaddleOCR(
            **models,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            text_det_limit_type="min",
            text_det_limit_side_len=options["limit_side_len"],
            text_det_box_thresh=options["box_thresh"],
            text_det_unclip_ratio=options["unclip_ratio"],
            text_recognition_batch_size=1,
            device="cpu",
            engine="onnxruntime",
            engine_config={"intra_op_num_threads": 1, "inter_op_num_threads": 1},  # more would spin, and slow the rest
        )
    except Exception as error:
        which = f"in {options['det_dir']} and {options['rec_dir']}" if options["det_dir"] else f"({_LOCAL})"
        raise RuntimeError(f"cannot load PaddleOCR's models {which}: {reason(error)}") from error


def _model_name(folder: Path, version: str | None) -> str:
    """The name of the model in `folder`, without which PaddleOCR does not open it."""
    for file in _FILES:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; a model's directory holds {' and '.join(_FILES)}")
    import yaml

    config = yaml.safe_load((folder / "inference.yml").read_text(encoding="utf-8"))
    try:
        name = str(config["Global"]["model_name"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'inference.yml'} does not name its model: it lacks Global.model_name") from error
    if version is not None and version not in name:
        raise ValueError(f"ocr_version is {version!r}, but {folder} holds the model {name!r}")
    return name


def _describe(pipeline: Any) -> dict[str, str]:
    from paddleocr import __version__

    parts = pipeline._merged_paddlex_config["SubModules"]
    return {
        "paddleocr": __version__,
        "det": parts["TextDetection"]["model_name"],
        "rec": parts["TextRecognition"]["model_name"],
    }
