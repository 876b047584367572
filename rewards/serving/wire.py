"""What the reward service and its client say to each other: JSON, with the pixels in base64. Never pickle.

A request is ``{"images": {"shape": [B, H, W, 3], "data": "<base64 of the pixels' bytes, RGB>"}, "scenes": [...]}``
with one JSON object a scene, such as ``{"prompt": 'A sign that says "RUN"', "words": ["RUN"]}``. In place of raw bytes
the images may be PNG files: ``{"images": {"png": ["<base64>", ...]}, ...}``.

The answer holds the fields of `RewardOutput` as lists, with null for what is not applicable, and ``crc32``, the
checksum of the pixels of each image, so that the client knows which image each score belongs to.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import math
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import HasWords, RewardOutput
from rewards.components import Component, from_json
from rewards.reason import reason
from rewards.serving.pool import rebuilt

# Types that a client may send by mistake, and of which `check_images` says what is wrong.
DTYPES = ("uint8", "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint16", "uint32")
LARGEST = float(np.finfo(np.float32).max)


class TooLarge(ValueError):
    """A request of more than the service takes."""


# Requests ------------------------------------------------------------------------------------------------------------


def encode_request(images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> bytes:
    """The body of a request. ValueError for a scene that JSON cannot hold."""
    described = [describe(scene, index) for index, scene in enumerate(scenes)]
    data = base64.b64encode(images.tobytes()).decode()
    return json.dumps({"images": {"shape": images.shape, "data": data}, "scenes": described}).encode()


def describe(scene: Any, index: int) -> dict[str, Any]:
    """The attributes of a scene that are public, those of objects inside it too."""
    try:
        values = dataclasses.asdict(scene) if dataclasses.is_dataclass(scene) else vars(scene)  # type: ignore[arg-type]
        public = {name: value for name, value in values.items() if not name.startswith("_")}
        json.dumps(public, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"scene {index} ({scene!r:.80}) cannot be sent as JSON: {error}") from error
    return public


def decode_request(body: bytes, max_images: int, max_bytes: int) -> tuple[NDArray[np.uint8], list[HasWords]]:
    """The images and the scenes of a request.

    Args:
        body: as `encode_request` makes it, or with PNG files.
        max_images: TooLarge for more.
        max_bytes: of pixels; TooLarge for PNG files that hold more.

    Raises:
        ValueError: saying what is not as the module's docstring has it. Whether the images and the scenes are such as
            a reward takes is not looked at here.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is no JSON: {error}") from error
    if not isinstance(request, dict) or not {"images", "scenes"} <= request.keys():
        raise ValueError('the body must be a JSON object with "images" and "scenes"')
    scenes, images = request["scenes"], request["images"]
    if not isinstance(scenes, list) or not all(isinstance(scene, dict) for scene in scenes):
        raise ValueError('"scenes" must be a list of JSON objects, one an image, such as {"words": ["RUN"]}')
    if isinstance(images, dict) and isinstance(images.get("png"), list):
        array = _from_png(images["png"], max_images, max_bytes)
    elif isinstance(images, dict) and {"shape", "data"} <= images.keys():
        array = _from_raw(images["shape"], images["data"], images.get("dtype", "uint8"), max_images)
    else:
        raise ValueError('"images" must be {"shape": [B, H, W, 3], "data": base64} or {"png": [base64, ...]}')
    if not len(array):
        raise ValueError("the batch is empty: send at least one image")
    return array, [SimpleNamespace(**scene) for scene in scenes]


def _from_raw(shape: Any, data: Any, dtype: Any, max_images: int) -> NDArray[Any]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape) or not shape:
        raise ValueError(f'"shape" must be a list of whole numbers, [B, H, W, 3], got {shape!r:.80}')
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f'"dtype" must be "uint8", got {dtype!r:.80}')
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if shape[0] > max_images:
        raise TooLarge(
            f"the batch has {shape[0]} images, this service takes {max_images} at most: send several batches"
        )
    raw = _from_base64(data, '"data"')
    if len(raw) != size:
        raise ValueError(f'"data" holds {len(raw)} bytes, not the {size} of shape {shape} and dtype {dtype}')
    return np.frombuffer(raw, dtype).reshape(shape)


def _from_png(files: list[Any], max_images: int, max_bytes: int) -> NDArray[Any]:
    if len(files) > max_images:
        raise TooLarge(
            f"the batch has {len(files)} images, this service takes {max_images} at most: send several batches"
        )
    arrays: list[NDArray[Any]] = []
    size = 0
    for index, file in enumerate(files):
        raw = _from_base64(file, f"image {index}")
        try:
            with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
                size += image.width * image.height * 3
                if size <= max_bytes:  # which the header says before any pixel is unpacked
                    arrays.append(np.atleast_3d(np.asarray(with_colours(image))))
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(f"image {index} is no readable PNG file: {reason(error)}") from error
        if size > max_bytes:
            raise TooLarge(f"the images hold more than {max_bytes} bytes of pixels, the most this service takes")
        if arrays[index].shape != arrays[0].shape:
            raise ValueError(
                f"the images of a batch must have one size: image 0 is {_shape(arrays[0])}, "
                f"image {index} is {_shape(arrays[index])}; send one batch a size"
            )
    return np.stack(arrays) if arrays else np.zeros((0, 0, 0, 3), np.uint8)


def with_colours(image: Image.Image) -> Image.Image:
    """A palette's image with its colours, RGB, or RGBA if it has transparency; others as they are.

    Its pixels are numbers of colours, which would pass for grey levels.
    """
    if image.mode != "P":
        return image
    return image.convert("RGBA" if "transparency" in image.info else "RGB")


def _shape(array: NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape))


def _from_base64(text: Any, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{name} is not base64: {error}") from error


# Answers -------------------------------------------------------------------------------------------------------------


def encode_answer(output: RewardOutput, images: NDArray[np.uint8]) -> bytes:
    """The body of an answer: what was found in which images."""
    answer = {
        "scores": _nullable(output.scores),
        "parts": {name: _nullable(values) for name, values in output.parts.items()},
        "words": output.words,
        "confidences": output.confidences,
        "regions": [boxes.tolist() for boxes in output.regions],
        "applicable": output.applicable.tolist(),
        "components": [[component.as_json() for component in found] for found in output.components],
        "reads": output.reads,
        "reads_words": output.reads_words,
        "crc32": checksums(images),
    }
    return json.dumps(answer, allow_nan=False).encode()


def decode_answer(body: bytes, images: NDArray[np.uint8]) -> RewardOutput:
    """What the answer says of these images. ValueError for any other answer than `encode_answer`'s of them."""
    try:
        answer = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
    columns_of = ("scores", "words", "confidences", "regions", "applicable", "components", "crc32")
    fields = ("scores", "parts", *columns_of[1:], "reads", "reads_words")
    missing = [name for name in fields if not isinstance(answer, dict) or name not in answer]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    parts = answer["parts"]
    if not isinstance(parts, dict):
        raise ValueError(f"its parts are {parts!r:.80}, not an object")
    columns = {name: answer[name] for name in columns_of}
    for name, values in {**columns, **{f"part {name!r}": values for name, values in parts.items()}}.items():
        length = len(values) if isinstance(values, list) else None
        if length != len(images):
            raise ValueError(f"it holds {length or 'no'} {name} for {len(images)} images")
    if answer["crc32"] != checksums(images):
        raise ValueError("its scores belong to other images, or to these in another order")
    applicable = answer["applicable"]
    if not all(type(value) is bool for value in (*applicable, answer["reads"], answer["reads_words"])):
        raise ValueError("its 'applicable', 'reads' and 'reads_words' are not all true or false")
    scores = _numbers("scores", answer["scores"])
    if (np.isnan(scores) == applicable).any():
        raise ValueError("it holds null for a score, or a score that is not applicable")
    for words, confidences in zip(answer["words"], answer["confidences"], strict=True):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"its words of an image are {words!r:.80}, not a list of strings")
        if not isinstance(confidences, list) or len(confidences) != len(words):
            raise ValueError(f"its confidences of the words {words!r:.80} are {confidences!r:.80}")
        if not all(type(value) in (int, float) and 0 <= value <= 1 for value in confidences):
            raise ValueError(f"its confidences {confidences!r:.80} do not lie in [0, 1]")
    return rebuilt(
        answer["reads"],
        answer["reads_words"],
        scores,
        {name: _numbers(name, values) for name, values in parts.items()},
        answer["words"],
        answer["confidences"],
        [_boxes(boxes) for boxes in answer["regions"]],
        np.array(applicable, bool),
        [_components(found) for found in answer["components"]],
    )


def checksums(images: NDArray[np.uint8]) -> list[int]:
    """The CRC-32 of the bytes of each image."""
    return [zlib.crc32(image.tobytes()) for image in images]


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _nullable(values: NDArray[np.float32]) -> list[float | None]:
    """Numbers, which JSON gives back bit for bit, and None for NaN, which means not applicable."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _numbers(name: str, values: list[Any]) -> NDArray[np.float32]:
    """The inverse of `_nullable`. ValueError for what is neither null nor a finite number."""
    for index, value in enumerate(values):
        if value is not None and (type(value) not in (int, float) or not abs(value) <= LARGEST):
            raise ValueError(f"its {name} of image {index} is {value!r:.80}, not a finite number")
    return np.array([np.nan if value is None else value for value in values], np.float32)


def _components(found: Any) -> list[Component]:
    if not isinstance(found, list):
        raise ValueError(f"its components of an image are {found!r:.80}, not a list")
    return [from_json(entry) for entry in found]


def _boxes(boxes: Any) -> NDArray[np.float32]:
    try:
        array = np.array(boxes, np.float32).reshape(-1, 4)
        if not np.isfinite(array).all():
            raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        raise ValueError(f"its regions of an image are {boxes!r:.80}, not a list of [x0, y0, x1, y1]") from error
    return array
