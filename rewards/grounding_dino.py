"""Grounding DINO (Liu et al., arXiv 2303.05499): a detector of objects that are named in words, and its reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewards import hub
from rewards.base import HasWords, RewardOutput, check_count, check_images
from rewards.detection import Detection


class GroundingDINODetector:
    """Finds objects by name. Each box has the label that fits it best, with the mean over the label's tokens as score.

    That is how T2I-R1 (arXiv 2505.00703) reads the model: transformers' own reading joins the tokens above a
    threshold, and these need not make up one of the labels. Of two boxes of a label that overlap, the better stays.

    Args:
        model: a checkpoint on the Hugging Face hub, or a folder that holds one with its processor.
        threshold: the least score of a box, in [0, 1]; T2I-R1 takes 0.3.
        overlap: the intersection over union, in [0, 1], above which two boxes of one label count as one object;
            T2I-R1 takes 0.5 where it counts.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto; see `hub.ModelReward`.
        batch_size: images at a time. Changes the result by rounding only.
    """

    def __init__(
        self,
        model: str = "IDEA-Research/grounding-dino-tiny",
        threshold: float = 0.3,
        overlap: float = 0.5,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        for option, value in {"threshold": threshold, "overlap": overlap}.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{option} must lie in [0, 1], got {value}")
        hub.check_options(dtype, batch_size)
        self.model, self.threshold, self.overlap = str(model), threshold, overlap
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    def load(self) -> tuple[Any, Any]:
        """Load the model and its processor now. OSError that says how to get the weights when they are not there."""
        classes = "AutoModelForZeroShotObjectDetection", "GroundingDinoProcessor"
        return hub.load(*classes, self.model, device=self.device, dtype=self.dtype)

    def detect(self, images: NDArray[np.uint8], labels: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """What each of the (B, H, W, 3) uint8 RGB images holds of its own list of labels, the best first.

        Labels are read in lower case. No labels for an image: nothing found. ValueError for images of another form,
        lists that do not match the images in number, and a label that is blank or holds "." or "?", which separate
        labels.
        """
        check_images(images)
        if len(labels) != len(images):
            raise ValueError(f"got {len(labels)} lists of labels for {len(images)} images; pass one an image")
        for index, names in enumerate(labels):
            check_labels(names, f"the labels of image {index}")
        found: list[list[Detection]] = [[] for _ in labels]
        asked = [index for index, names in enumerate(labels) if names]
        for start in range(0, len(asked), self.batch_size):
            rows = asked[start : start + self.batch_size]
            for row, detections in zip(rows, self._detect(images[rows], [labels[row] for row in rows]), strict=True):
                found[row] = detections
        return found

    def _detect(self, images: NDArray[np.uint8], labels: list[Sequence[str]]) -> list[list[Detection]]:
        import torch

        model, processor = self.load()
        names = [list(dict.fromkeys(row)) for row in labels]  # a label given twice is one label
        read = [tokens_of(processor.tokenizer, row, model.config.max_text_len) for row in names]
        texts, spans = [tokens for tokens, _ in read], [spans for _, spans in read]
        inputs = processor.tokenizer.pad({"input_ids": texts}, padding_side="right", return_tensors="pt")
        pixels = processor.image_processor(hub.pil_images(images), return_tensors="pt")
        with torch.inference_mode():
            output = model(
                pixel_values=pixels.pixel_values.to(model.device, model.dtype),
                pixel_mask=pixels.pixel_mask.to(model.device),
                **inputs.to(model.device),
            )
        tokens = output.logits.float().sigmoid().cpu().numpy()  # (B, queries, tokens)
        centres, sides = np.split(output.pred_boxes.float().cpu().numpy(), 2, axis=2)
        width_height = np.array([images.shape[2], images.shape[1]])
        corners = np.concatenate([centres - sides / 2, centres + sides / 2], axis=2) * np.tile(width_height, 2)
        boxes = np.clip(corners, 0, np.tile(width_height, 2))  # (B, queries, 4) as x0, y0, x1, y1 in pixels
        found = []
        for row, asked in enumerate(names):
            scores = np.stack([tokens[row, :, span].mean(axis=1) for span in spans[row]], axis=1)  # (queries, labels)
            found.append(self._read(scores, boxes[row], asked))
        return found

    def _read(self, scores: NDArray[np.float32], boxes: NDArray[np.float32], names: list[str]) -> list[Detection]:
        """The boxes that score enough and are no doubles, from the scores (queries, labels)."""
        kept: list[Detection] = []
        best = scores.argmax(axis=1)
        for query in np.argsort(-scores.max(axis=1), kind="stable"):
            score, label = float(scores[query, best[query]]), names[best[query]]
            if score < self.threshold:
                break
            box = tuple(boxes[query].tolist())
            if all(other.label != label or intersection_over_union(other.box, box) <= self.overlap for other in kept):
                kept.append(Detection(label, score, box))
        return kept


def tokens_of(tokenizer: Any, labels: list[str], most: int) -> tuple[list[int], list[slice]]:
    """The tokens of the model's text, "cat. red dog.", and where in it each label stands."""
    tokens, spans = [tokenizer.cls_token_id], []
    stop = tokenizer.convert_tokens_to_ids(".")
    for label in labels:
        name = tokenizer(label.lower(), add_special_tokens=False).input_ids
        spans.append(slice(len(tokens), len(tokens) + len(name)))
        tokens += [*name, stop]
    tokens.append(tokenizer.sep_token_id)
    if len(tokens) > most:
        raise ValueError(f"{len(labels)} labels take {len(tokens)} tokens and the model reads {most}; ask for fewer")
    return tokens, spans


def check_labels(labels: Any, whose: str) -> None:
    """Raise ValueError unless `labels` is a sequence of names that the detector can keep apart."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(f"{whose} must be a list of strings, got {labels!r:.80}")
    for label in labels:
        if not isinstance(label, str) or not label.strip() or set(label) & set(".?"):
            raise ValueError(f"{whose} hold {label!r}; a label is a name, not blank and without '.' and '?'")


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two boxes x0, y0, x1, y1. In [0, 1]; 0 for boxes without area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


class GroundingDINOReward(hub.ModelReward):
    """The share of the objects asked for that the detector finds at least once.

    Scores lie in [0, 1]. It is what T2I-R1 (arXiv 2505.00703) gives prompts of objects and attributes; its terms for
    counts and positions are the matter of `rewards.geneval`. STAGE's mixture has it as its part "Gdino". The boxes
    found are an image's `regions`; `words` are empty.

    Args:
        labels: the objects to look for in every image. None: each scene's own, its `.objects`.
        model: a checkpoint of Grounding DINO on the Hugging Face hub, or a folder that holds one with its processor.
        threshold: the least score of a box; see `GroundingDINODetector`.
        device: where the model runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        dtype: float32, bfloat16, float16, or auto; see `hub.ModelReward`.
        batch_size: images at a time. Changes the result by rounding only.
    """

    name = "grounding_dino"
    score_range = (0.0, 1.0)

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        model: str = "IDEA-Research/grounding-dino-tiny",
        threshold: float = 0.3,
        device: str = "auto",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        super().__init__(model, device, dtype, batch_size)
        if labels is not None:
            check_labels(labels, "the reward's labels")
            if not labels:
                raise ValueError("the reward's labels are empty; name an object, or pass None for the scenes' own")
        self.labels = None if labels is None else list(labels)
        self.detector = GroundingDINODetector(model, threshold, device=device, dtype=dtype, batch_size=batch_size)

    def load(self) -> tuple[Any, Any]:
        return self.detector.load()

    def check_scenes(self, scenes: Sequence[HasWords], count: int) -> None:
        """Raise ValueError unless there are `count` scenes, each with `.objects` where the reward has no labels."""
        check_count(scenes, count)
        for index, scene in enumerate(scenes if self.labels is None else ()):
            objects = getattr(scene, "objects", None)
            if not objects:
                raise ValueError(
                    f"scene {index} ({scene!r:.80}) needs `.objects`, the names of what the image should show; "
                    "or give the reward its option `labels`"
                )
            check_labels(objects, f"the objects of scene {index}")

    def score(self, images: NDArray[np.uint8], scenes: Sequence[HasWords]) -> RewardOutput:
        asked = [self.labels or list(scene.objects) for scene in scenes]  # type: ignore[attr-defined]
        found = self.detector.detect(images, asked)
        shares = [
            len({box.label for box in boxes}) / len(set(labels)) for boxes, labels in zip(found, asked, strict=True)
        ]
        regions = [np.array([box.box for box in boxes], np.float32).reshape(-1, 4) for boxes in found]
        return RewardOutput(np.array(shares, np.float32), regions=regions)
