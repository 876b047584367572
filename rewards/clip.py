"""CLIPScore (Hessel et al., arXiv 2104.08718): how well an image fits its prompt, for a CLIP model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rewards.base import HasWords, Reward, RewardOutput

WEIGHT = 2.5  # w of eq. 1, which stretches what CLIP gives to about [0, 1]


class CLIPScore(Reward):
    """Compares each image with its scene's prompt, eq. 1 of Hessel et al.: ``2.5 * max(cos(image, prompt), 0)``.

    Scores lie in [0, 2.5]; of good pictures about 0.8, as in the paper's tables. The prompt is taken as it is, without
    the "A photo depicts" that the authors put before captions, and cut at the text model's maximum length. Words are
    not read: an image's `words` and `regions` are empty.

    The model loads on the first call, or on `load`, and is shared by all rewards with the same model and device.

    Args:
        model: a checkpoint's name on the Hugging Face hub, or a folder that holds one with its processor.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        batch_size: images at a time. Does not change the result.
    """

    name = "clip"

    def __init__(self, model: str = "openai/clip-vit-base-patch32", device: str = "auto", batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.device, self.batch_size = str(model), device, batch_size

    def load(self) -> None:
        """Load the model now. OSError that says how to get the weights when they are not there."""
        load_clip(self.model, self.device)

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        prompts = [prompt_of(scene, index) for index, scene in enumerate(scenes)]
        model, processor = load_clip(self.model, self.device)
        cosines = [
            cosine(model, processor, images[start : start + self.batch_size], prompts[start : start + self.batch_size])
            for start in range(0, len(images), self.batch_size)
        ]
        return RewardOutput(WEIGHT * np.maximum(np.concatenate([np.zeros(0, np.float32), *cosines]), 0))  # eq. 1


def prompt_of(scene: HasWords, index: int) -> str:
    """The scene's prompt. ValueError when it has none."""
    prompt = getattr(scene, "prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"scene {index} ({scene!r:.80}) needs `.prompt`, the text to compare the image with; got {prompt!r}"
        )
    return prompt


def cosine(model: Any, processor: Any, images: NDArray[np.uint8], prompts: list[str]) -> NDArray[np.float32]:
    """The cosine between the embeddings of each image and its prompt, (B,)."""
    import torch

    inputs = processor(
        text=prompts,
        images=[Image.fromarray(image) for image in images],
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
    )
    with torch.inference_mode():
        output = model(**inputs.to(model.device))
        return torch.cosine_similarity(output.image_embeds, output.text_embeds).cpu().numpy()


@functools.cache
def load_clip(name: str, device: str) -> tuple[Any, Any]:
    """A CLIP model in evaluation mode and its processor. OSError with the remedy when they cannot be had."""
    import torch
    from transformers import CLIPModel, CLIPProcessor

    try:
        loaded: Any = CLIPModel.from_pretrained(name, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        remedy = f"fetch it with `hf download {name}`, or give a local folder that holds a checkpoint"
        if Path(name).is_dir():
            remedy = "the folder needs config.json, the weights, the tokenizer's files and preprocessor_config.json"
        reason = str(error).partition("\n")[0]
        raise OSError(f"cannot load the CLIP checkpoint {name!r}: {remedy} ({reason})") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would fill them at random
        missing = sorted(report["missing_keys"])
        raise OSError(f"{name!r} is not a whole CLIP checkpoint: it lacks {len(missing)} weights, such as {missing[0]}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.float().to(device).eval(), processor  # some checkpoints are kept in half precision
