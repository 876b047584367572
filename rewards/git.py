"""GIT (Wang et al., arXiv 2205.14100), asked about an image: a reward of T2I-R1 (Jiang et al., arXiv 2505.00703).

STAGE's mixture of rewards has it as its part "Git".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import hub
from rewards.base import HasWords, RewardOutput

QUESTION = "does this image show {prompt}?"


class GITReward(hub.ModelReward):
    """How sure a model that answers questions is of yes: the mean over the questions of ``p(yes) / (p(yes) + p(no))``.

    p is the distribution of the first word of the answer. Scores lie in [0, 1]. Words are not read: an image's `words`
    and `regions` are empty.

    A scene may have `.questions`, which are asked as they are. T2I-R1 asks for each object with its attribute, without
    a verb: "purple elephant?", "blue teddy bear?". A scene without them is asked one question made from its prompt,
    "does this image show {prompt}?". The model knows lower case only, and its tokenizer sees to that.

    Args:
        model: a checkpoint of GIT that answers questions, on the Hugging Face hub or in a folder, with its processor.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto; see `hub.ModelReward`.
        batch_size: questions at a time. Does not change the result.
    """

    name = "git"
    score_range = (0.0, 1.0)

    def __init__(
        self,
        model: str = "microsoft/git-large-vqav2",
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        super().__init__(model, device, dtype, batch_size)

    def load(self) -> tuple[Any, Any]:
        return hub.load("GitForCausalLM", "GitProcessor", self.model, device=self.device, dtype=self.dtype)

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes with prompts and, if they have any, `.questions` of text."""
        super().check_scenes(scenes, count)
        for index, scene in enumerate(scenes):
            questions = getattr(scene, "questions", None) or ()
            if isinstance(questions, str) or not all(isinstance(q, str) and q.strip() for q in questions):
                raise ValueError(f"`.questions` of scene {index} must be a sequence of strings, got {questions!r:.80}")

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        model, processor = self.load()
        questions = [questions_of(scene) for scene in scenes]
        image_of = np.repeat(np.arange(len(images)), [len(texts) for texts in questions])  # one entry a question
        texts = [text for group in questions for text in group]
        sure = [yes(model, processor, images[image_of[rows]], texts[rows]) for rows in self.batches(len(texts))]
        totals = np.bincount(image_of, np.concatenate(sure), minlength=len(images))
        return RewardOutput((totals / [len(group) for group in questions]).astype(np.float32))


def questions_of(scene: Any) -> list[str]:
    """What to ask about a scene: its own questions, or one that is made from its prompt."""
    return list(getattr(scene, "questions", None) or ()) or [QUESTION.format(prompt=scene.prompt)]


def yes(model: Any, processor: Any, images: NDArray[np.uint8], questions: list[str]) -> NDArray[np.float32]:
    """p(yes) / (p(yes) + p(no)) after each image and its question, (B,)."""
    import torch

    tokenizer = processor.tokenizer
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
    if tokenizer.unk_token_id in answers:
        raise ValueError(f"the vocabulary of {model.name_or_path!r} lacks yes or no; use a checkpoint that knows both")
    most = model.config.max_position_embeddings - 1
    # The question follows the start token and stays open for the answer: no end token.
    asked = [
        [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False).input_ids[:most]] for text in questions
    ]
    inputs = tokenizer.pad({"input_ids": asked}, padding_side="right", return_tensors="pt").to(model.device)
    pixels = processor.image_processor(hub.pil_images(images), return_tensors="pt").pixel_values
    with torch.inference_mode():
        output = model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            pixel_values=pixels.to(model.device, model.dtype),
        )
        text = output.logits[:, -inputs.input_ids.shape[1] :]  # the image's positions come first
        last = inputs.attention_mask.sum(1) - 1
        logits = text[torch.arange(len(last), device=last.device), last][:, answers].float()  # (B, 2)
        return logits.softmax(1)[:, 0].cpu().numpy()
