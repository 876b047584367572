"""PickScore (Kirstain et al., *Pick-a-Pic*, arXiv 2305.01569): which image people would pick, for a CLIP model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import hub
from rewards.base import HasWords, RewardOutput
from rewards.clip import cosine

PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}  # as its model card says


class PreferenceReward(hub.ModelReward):
    """The score that Pick-a-Pic trains a CLIP model to give: ``exp(logit_scale) * cos(image, prompt)``.

    Between two images of one prompt, the sigmoid of the difference is the probability that people prefer the first.
    Scores lie in [-s, s] for the model's ``s = exp(logit_scale)``, which is 100 at most in CLIP's training; the public
    checkpoint gives most images about 20. The prompt is cut at the text model's maximum length. Words are not read:
    an image's `words` and `regions` are empty.

    Args:
        model: a checkpoint of a CLIP model on the Hugging Face hub, or a folder that holds one.
        processor: the checkpoint or the folder with the processor. None: the one that the model card of PickScore_v1
            names for that checkpoint, and for another model its own.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto; see `hub.ModelReward`.
        batch_size: images at a time. Does not change the result.
    """

    name = "preference"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 32,
    ) -> None:
        super().__init__(model, device, dtype, batch_size)
        self.processor = str(processor or PROCESSORS.get(self.model, self.model))

    def load(self) -> tuple[Any, Any]:
        return hub.load("CLIPModel", "CLIPProcessor", self.model, self.processor, self.device, self.dtype)

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        model, processor = self.load()
        prompts = hub.prompts_of(scenes)
        cosines = [cosine(model, processor, images[rows], prompts[rows]) for rows in self.batches(len(images))]
        scale = math.exp(model.logit_scale.item())
        return RewardOutput(np.float32(scale) * np.concatenate(cosines))
