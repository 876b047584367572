"""Models of the transformers library: the one place that loads them, and the base of the rewards that use them."""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import HasWords, Reward, check_count
from rewards.old_names import keep_old_names

DTYPES = ("auto", "float32", "bfloat16", "float16")
FILES = "config.json, the weights, the tokenizer's files and preprocessor_config.json"
LOADING = threading.Lock()  # two threads that need one model load it once


class ModelReward(Reward):
    """A reward that a model computes from images and the prompts of their scenes, a batch at a time.

    Holds names only: the model loads on the first call, or on `load`, and all rewards with the same model, device and
    dtype share it.

    Args:
        model: a checkpoint's name on the Hugging Face hub, or a folder that holds one.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto, which is bfloat16 off the CPU and float32 on it.
        batch_size: rows at a time. Changes the result by rounding only.
    """

    def __init__(self, model: str, device: str, dtype: str, batch_size: int) -> None:
        check_options(dtype, batch_size)
        self.model, self.device, self.dtype, self.batch_size = str(model), device, dtype, batch_size

    @abstractmethod
    def load(self) -> Any:
        """Load the model and its processor now, and return them. OSError with the remedy when they cannot be had."""

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes, each with a prompt."""
        check_prompts(scenes, count)

    def describe(self) -> dict[str, str]:
        return {"model": self.model, "dtype": self.dtype}

    def batches(self, count: int) -> list[slice]:
        """Slices that cut `count` rows into batches."""
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]


def check_options(dtype: str, batch_size: int) -> None:
    """Raise ValueError for a dtype that does not exist and a batch size below one."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")


def check_prompts(scenes: Sequence[HasWords], count: int) -> None:
    """Raise ValueError unless there are `count` scenes, each with a `.prompt` that is not blank."""
    check_count(scenes, count)
    for index, scene in enumerate(scenes):
        prompt = getattr(scene, "prompt", None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"scene {index} ({scene!r:.80}) needs `.prompt`, the text to compare the image with; got {prompt!r}"
            )


def prompts_of(scenes: Sequence[HasWords]) -> list[str]:
    """The prompts of scenes that have passed `check_prompts`."""
    return [scene.prompt for scene in scenes]  # type: ignore[attr-defined]


def pil_images(images: NDArray[np.uint8]) -> list[Image.Image]:
    """The (B, H, W, 3) images one by one, in the form that says which axis is which."""
    return [Image.fromarray(image) for image in images]


def load(
    model_class: str,
    processor_class: str,
    name: str,
    processor: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> tuple[Any, Any]:
    """A model in evaluation mode and its processor: one object each a process for the same arguments.

    Args:
        model_class: the model's class in transformers, such as CLIPModel.
        processor_class: the processor's class in transformers, such as CLIPProcessor.
        name: the checkpoint's name on the hub, or a folder that holds it.
        processor: the name or the folder of the processor, where that is another one.
        device: see `ModelReward`.
        dtype: see `ModelReward`.

    Raises:
        OSError: the checkpoint or the processor cannot be had or is not whole. Says what to do.
    """
    device, dtype = place(device, dtype)
    with LOADING:
        return _load(model_class, processor_class, name, processor or name, device, dtype)


@functools.cache
def _load(
    model_class: str, processor_class: str, name: str, processor_name: str, device: str, dtype: str
) -> tuple[Any, Any]:
    import torch
    import transformers

    kind = processor_class.removesuffix("Processor")
    with explained(kind, name):
        loaded = getattr(transformers, model_class).from_pretrained(name, output_loading_info=True)
    model, report = loaded
    check_whole(kind, name, report["missing_keys"])
    with explained(kind, processor_name):
        processor = getattr(transformers, processor_class).from_pretrained(processor_name)
    return model.to(device, getattr(torch, dtype)).eval(), processor


def place(device: str, dtype: str) -> tuple[str, str]:
    """The device and the dtype that "auto" stands for, and others as they are; see `ModelReward`."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, dtype


@contextmanager
def explained(kind: str, name: str, files: str = FILES) -> Iterator[None]:
    """Turns what transformers raises for a checkpoint into an OSError that names it, the remedy and the reason."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        remedy = f"fetch it with `hf download {name}`, or give a local folder that holds a checkpoint"
        if Path(name).is_dir():
            remedy = f"the folder needs {files}"
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot load the {kind} checkpoint {name!r}: {remedy} ({reason})") from error


def check_whole(kind: str, name: str, missing: Collection[str]) -> None:
    """Raise OSError when weights are missing: transformers would fill them at random and go on."""
    if missing:
        raise OSError(
            f"{name!r} is not a whole {kind} checkpoint: it lacks {len(missing)} weights, such as {min(missing)}"
        )


keep_old_names(globals(), pictures="pil_images")
