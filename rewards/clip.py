"""CLIPScore (Hessel et al., arXiv 2104.08718): how well an image fits its prompt, for a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import hub
from rewards.base import HasWords, RewardOutput

WEIGHT = 2.5  # w of eq. 1, which stretches what CLIP gives to about [0, 1]


class CLIPScore(hub.ModelReward):
    """Compares each image with its scene's prompt, eq. 1 of Hessel et al.: ``2.5 * max(cos(image, prompt), 0)``.

    Scores lie in [0, 2.5]; of good images about 0.8, as in the paper's tables. The prompt is taken as it is, without
    the "A photo depicts" that the authors put before captions, and cut at the text model's maximum length. Words are
    not read: an image's `words` and `regions` are empty.

    Args:
        model: a checkpoint's name on the Hugging Face hub, or a folder that holds one with its processor.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        batch_size: images at a time. Does not change the result.
        dtype: float32, bfloat16, float16, or auto; see `hub.ModelReward`.
    """

    name = "clip"
    score_range = (0.0, WEIGHT)

    def __init__(
        self,
        model: str = "openai/clip-vit-base-patch32",
        device: str = "auto",
        batch_size: int = 32,
        dtype: str = "float32",
    ) -> None:
        super().__init__(model, device, dtype, batch_size)

    def load(self) -> tuple[Any, Any]:
        return hub.load("CLIPModel", "CLIPProcessor", self.model, device=self.device, dtype=self.dtype)

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        model, processor = self.load()
        prompts = hub.prompts_of(scenes)
        cosines = [cosine(model, processor, images[rows], prompts[rows]) for rows in self.batches(len(images))]
        return RewardOutput(np.float32(WEIGHT) * np.maximum(np.concatenate(cosines), 0))  # eq. 1


def cosine(model: Any, processor: Any, images: NDArray[np.uint8], prompts: list[str]) -> NDArray[np.float32]:
    """The cosine between the embeddings of each image and its prompt, (B,)."""
    import torch

    inputs = processor(
        text=prompts,
        images=hub.pil_images(images),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.inference_mode():
        output = model(**inputs.to(model.device))
        return torch.cosine_similarity(output.image_embeds.float(), output.text_embeds.float()).cpu().numpy()
