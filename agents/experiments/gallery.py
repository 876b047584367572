"""What a run keeps of its final evaluation for people: a few images as they grow, where the reward looked, MP's masks.

`save` writes two files into a run's folder, and report.html shows them. ``gallery.png`` has a row a prompt and a column
a frame, the image after each scale; ``gallery.json`` tells the rest. The prompts are the first held-out ones, the same
for all runs of a comparison. Nothing is sampled for them: the frames are decoded from the tokens of the evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from agents import Agent, MaskPropagation, Wrapper
from agents.common.files import replacing
from agents.evaluation import Evaluation
from agents.experiments.output import write_json
from agents.mask_propagation import boxes_to_mask, propagate_mask, visible_boxes
from var_env.schedule import ScaleSchedule
from var_env.tokenizers.base import VisualTokenizer

FRAMES = 16  # at most, of an image: a raster has one a row
SIDE = 128  # px, at most, of a frame


def mask_of(agent: Agent | Wrapper) -> MaskPropagation | None:
    """The Mask Propagation among an agent's wrappers, if it has one."""
    link: Any = agent
    while isinstance(link, Wrapper):
        if isinstance(link, MaskPropagation):
            return link
        link = link.agent
    return None


def frames_of(schedule: ScaleSchedule) -> dict[str, int]:
    """After which grids an image is shown, by name: all scales, or rows of a raster, at most `FRAMES` of them."""
    bands = schedule.bands
    chosen = sorted({round(i) for i in np.linspace(0, len(bands) - 1, min(FRAMES, len(bands)))})
    return {bands[i][0].split("_")[-1] if not schedule.is_raster else f"row {i + 1}": bands[i][1][-1] for i in chosen}


@torch.no_grad()
def growth(tokenizer: VisualTokenizer, grids: list[Tensor]) -> np.ndarray:
    """The images of N rows of tokens after each of F frames, uint8 ``(N, F, S, S, 3)``."""
    canvas = tokenizer.blank(len(grids[0]))
    ends, frames = set(frames_of(tokenizer.schedule).values()), []
    for t, grid in enumerate(grids):
        canvas = tokenizer.write(t, canvas, grid.to(tokenizer.device))
        if t in ends:
            frames.append(tokenizer.decode(canvas).cpu().numpy())
    return np.stack(frames, 1)


def masks(boxes: list[np.ndarray], schedule: ScaleSchedule, mask: MaskPropagation) -> list[Tensor]:
    """MP's mask of each image at each frame, F of ``(N, h, w)``; of a raster the finest alone."""
    finest = torch.stack([boxes_to_mask(found, schedule, mask.soft, mask.dilation) for found in boxes])
    if schedule.is_raster:
        return [finest]
    of_grid = propagate_mask(finest, schedule)
    return [of_grid[t] for t in frames_of(schedule).values()]


def save(folder: Path, evaluation: Evaluation, tokenizer: VisualTokenizer, mask: MaskPropagation | None = None) -> None:
    """Write ``gallery.png`` and ``gallery.json``.

    Args:
        folder: of the run.
        evaluation: with the grids of the prompts to show.
        tokenizer: that decodes them.
        mask: the run's Mask Propagation, to be shown too.
    """
    schedule, size, count = tokenizer.schedule, tokenizer.image_size, len(evaluation.grids[0])
    images = growth(tokenizer, evaluation.grids)  # (N, F, S, S, 3)
    images[:, -1] = evaluation.images[:count]  # what was scored: another batch size may round otherwise
    sheet = Image.fromarray(images.swapaxes(1, 2).reshape(count * size, -1, 3))
    if size > SIDE:
        sheet = sheet.resize((sheet.width * SIDE // size, sheet.height * SIDE // size), Image.Resampling.BOX)
    scenes, regions = evaluation.scenes[:count], evaluation.regions[:count]
    content: dict[str, Any] = {"frames": list(frames_of(schedule)), "prompts": []}
    for i, scene in enumerate(scenes):
        entry = {
            "prompt": scene.prompt,
            "read": evaluation.words_read[i],
            "reward": round(float(evaluation.scores[i]), 3),
        }
        entry["boxes"] = [
            [round(edge / size, 4) for edge in box] for box in visible_boxes(regions[i], schedule).tolist()
        ]
        content["prompts"].append(entry)
    if mask is not None:
        looked = regions if mask.boxes == "read" else [np.asarray(scene.boxes) for scene in scenes]
        of_frames = masks(looked, schedule, mask)
        for i, entry in enumerate(content["prompts"]):
            entry["masks"] = [[[round(cell, 2) for cell in row] for row in m[i].float().tolist()] for m in of_frames]
    with replacing(folder / "gallery.png") as part:
        sheet.save(part)
    write_json(folder / "gallery.json", content)
