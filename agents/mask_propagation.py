"""Mask Propagation (MP): the policy gradient goes to the tokens that the reward looked at (section 3.5, Figure 4).

The regions that decide the reward, here the boxes of the text, become a mask on the finest grid. The mask is propagated
from finer to coarser grids. It gates the policy term of the loss. It leaves the KL term alone, so that the KL holds the
rest of the image as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from stable_baselines3.common.logger import Image
from torch import Tensor

from agents import logs
from agents.common import pictures
from agents.common.checks import require_at_least, require_choice
from agents.common.registry import register
from agents.grpo import GRPO, TokenWeights
from agents.rollout import Rollout
from agents.wrapper import Wrapper
from var_env.schedule import ScaleSchedule

SOURCES = ("read", "layout")
COMBINATIONS = ("union", "intersection", "mean")
Boxes = np.ndarray | Tensor | Sequence[Sequence[float]]


def visible_boxes(boxes: Boxes, schedule: ScaleSchedule, dilation: int = 0) -> Tensor:
    """Boxes xyxy in pixels, grown on every side by ``dilation``, cut to the image, and left out when nothing remains.

    ``(n, 4)`` to float32 ``(n', 4)``.
    """
    h, w = schedule.canvas
    size = torch.tensor([w, h], dtype=torch.float32) * schedule.patch  # of the image, in pixels
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 2, 2)  # (n, 2, xy)
    corners = corners + torch.tensor([[-dilation], [dilation]])
    corners = corners.clamp(min=torch.zeros(2)).minimum(size)
    return corners.flatten(1)[(corners[:, 1] > corners[:, 0]).all(1)]


def boxes_to_mask(boxes: Boxes, schedule: ScaleSchedule, soft: bool = False, dilation: int = 0) -> Tensor:
    """The mask of one image on the finest grid, ``(H, W)``, from boxes ``(n, 4)``, xyxy in pixels.

    Hard, a bool: a cell is on when a box overlaps it, be it by a fraction of a pixel; to share an edge is not enough.
    Soft, float32: the share of the cell's pixels that any box overlaps in this sense. Boxes may stick out of the
    image, and each grows by ``dilation`` pixels on every side.

    When no box overlaps the image, all cells are on: there is no box, or boxes have no area or lie outside. Images in
    which nothing can be read are the worst, and an empty mask would let them teach nothing.
    """
    h, w = schedule.canvas
    p = schedule.patch
    cell = 1 if soft else p  # px
    seen = visible_boxes(boxes, schedule, dilation)
    if len(seen) == 0:
        return torch.ones(h, w, dtype=torch.float32 if soft else torch.bool)
    x0, y0, x1, y1 = seen.unsqueeze(-1).unbind(1)  # (n, 1)
    rows, columns = torch.arange(0, h * p, cell), torch.arange(0, w * p, cell)
    on_rows = (y0 < rows + cell) & (y1 > rows)  # (n, h * p / cell)
    on_columns = (x0 < columns + cell) & (x1 > columns)  # (n, w * p / cell)
    on = on_rows.float().T @ on_columns.float() > 0  # by any box
    return on.view(h, p, w, p).float().mean((1, 3)) if soft else on


def propagate_mask(finest: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
    """From the mask of the finest grid, ``(B, H, W)``, those of all grids, T of ``(B, h_t, w_t)``, coarse to fine.

    Step by step from finer to coarser (Figure 4). Cell i of a side of h cells spans ``i / h`` to ``(i + 1) / h``,
    whether or not the grids nest. A bool mask is on in a coarser cell when any finer cell that it overlaps is on. A
    float mask is the mean over the finer cells, weighted by the overlap: the share of the coarser cell that is covered.
    A raster schedule has nothing coarser: grid t is the t-th cell of the image, and has its mask.
    """
    height, width = schedule.canvas
    if finest.shape[1:] != (height, width) or not (finest.dtype == torch.bool or finest.is_floating_point()):
        raise ValueError(
            f"the finest mask must be bool or float (B, {height}, {width}), got {finest.dtype} {tuple(finest.shape)}"
        )
    if schedule.is_raster:
        return [cell.view(-1, 1, 1) for cell in finest.flatten(1).unbind(1)]
    masks = [finest]
    for (h, w), (finer_h, finer_w) in zip(schedule.grids[-2::-1], schedule.grids[:0:-1], strict=True):
        rows, columns = (overlap(*sides).to(finest.device) for sides in ((h, finer_h), (w, finer_w)))
        covered = rows @ masks[-1].float() @ columns.T  # (B, h, w), an area
        masks.append(covered > 0 if finest.dtype == torch.bool else covered / (finer_h * finer_w))
    return masks[::-1]


def overlap(coarse: int, fine: int) -> Tensor:
    """How much cell i of ``coarse`` shares with cell j of ``fine`` along one side, exactly: float32 ``(coarse, fine)``.

    The unit is ``1 / (coarse * fine)`` of the side, which makes all of them whole numbers; a row sums to ``fine``.
    """
    i, j = torch.arange(coarse)[:, None] * fine, torch.arange(fine) * coarse  # where the cells begin
    return (torch.minimum(i + fine, j + coarse) - torch.maximum(i, j)).clamp(min=0).float()


@register("mp")
class MaskPropagation(Wrapper):
    """Gates the policy term by the propagated mask of what the reward looked at.

    The KL term is not gated. A row with K images, such as a prefix of VMR, has K masks and one advantage. By default
    its mask is their union, because each image shows what became of the row. The union grows with K. When nothing was
    read in one of the K images, `boxes_to_mask` makes all tokens count, and so does the union.

    There are two alternatives. "intersection" keeps a token where the reward looked in all K images. "mean" gives a
    token the share of the K images in which the reward looked there. Both propagate each image's mask to all scales
    before they combine, because the finest masks may share no cell while the coarser tokens above them do. An
    intersection can leave a row without any token at a scale.

    With GRPO's ``ratio_level="token"`` no policy gradient reaches a masked token. At the other levels some does,
    because a kept token's ratio is a mean over its grid or row, masked tokens included.

    Logs ``mask/kept_``, the mean of the mask at every scale. Every ``image_interval`` updates it logs
    ``mask/propagated`` to TensorBoard: images with their boxes beside the masks of all scales.

    Args:
        agent: the agent, or wrapper, inside.

    Raises:
        ValueError: other ``boxes`` or ``suffix_masks``, or a negative ``dilation``.
    """

    def __init__(
        self,
        agent: GRPO | Wrapper,
        *,
        boxes: Annotated[
            str,
            '"read" takes the regions that the reward found in the image, "layout" those of the scene. '
            "Beware: the shipped world draws the heights of the lines at random and the prompt does not tell "
            "them, so a scene's layout is not that of the images sampled for it, unless the world is "
            '``World(placement="even")``. A scene made from a prompt alone has no layout, and all of its tokens '
            "count.",
        ] = "read",
        soft: Annotated[bool, "weigh tokens by the share of their cell that is covered."] = False,
        dilation: Annotated[int, "pixels by which a box grows on every side."] = 0,
        suffix_masks: Annotated[
            str,
            'how the masks of a row\'s K images become one: "union", "intersection" or "mean".',
        ] = "union",
    ) -> None:
        require_choice(SOURCES, boxes=boxes)
        require_at_least(0, dilation=dilation)
        require_choice(COMBINATIONS, suffix_masks=suffix_masks)
        super().__init__(agent)
        self.boxes, self.soft, self.dilation, self.suffix_masks = boxes, soft, dilation, suffix_masks

    def token_weights(self, rollout: Rollout, steps: range) -> TokenWeights:
        weights = self.agent.token_weights(rollout, steps)
        masks = self.masks(rollout)
        self.record(rollout, masks, steps)
        flat = torch.cat([masks[t].flatten(1) for t in steps], 1).to(weights.policy)  # (B, n)
        return weights._replace(policy=weights.policy * flat)

    def boxes_of(self, rollout: Rollout, image: int) -> Boxes:
        """The boxes of one of the B * K images, ``(n, 4)``."""
        return rollout.regions[image] if self.boxes == "read" else rollout.scenes[image // rollout.suffixes].boxes

    def masks(self, rollout: Rollout) -> list[Tensor]:
        """The mask of every scale, T of ``(B, h_t, w_t)``, also of the scales that the rows leave out."""
        schedule = self.unwrapped.policy.schedule
        boxes = [self.boxes_of(rollout, image) for image in range(len(rollout.images))]
        finest = torch.stack([boxes_to_mask(found, schedule, self.soft, self.dilation) for found in boxes])
        rows = (-1, rollout.suffixes)  # K images each
        if self.suffix_masks == "union":
            return propagate_mask(finest.unflatten(0, rows).amax(1), schedule)
        masks = [mask.unflatten(0, rows) for mask in propagate_mask(finest, schedule)]  # (B, K, h_t, w_t)
        return [mask.amin(1) if self.suffix_masks == "intersection" else mask.float().mean(1) for mask in masks]

    def record(self, rollout: Rollout, masks: Sequence[Tensor], steps: range) -> None:
        """Log how much of each scale in ``steps`` is kept and, when it is time, an image of a few rows."""
        agent, rows = self.unwrapped, len(rollout.scenes)
        kept = [masks[t].float().mean().item() for t in steps]
        for name, share in logs.by_band(agent.policy.schedule, steps, kept).items():
            agent.logger.record(f"mask/kept_{name}", share)
        if agent.image_interval and agent.n_updates % agent.image_interval == 0 and logs.shows_images(agent.logger):
            shown = range(0, rows, -(-rows // 4))  # at most four, of different prompts if there are as many
            image = Image(self.sheet(rollout, masks, shown), "HWC")
            agent.logger.record("mask/propagated", image, exclude=logs.WITHOUT_IMAGES)

    def sheet(self, rollout: Rollout, masks: Sequence[Tensor], rows: Sequence[int]) -> np.ndarray:
        """An image of some rows for people, see `pictures.mask_sheet`."""
        schedule, k = self.unwrapped.policy.schedule, rollout.suffixes
        returns = rollout.returns.flatten().tolist()  # B * K
        shown = [image for row in rows for image in range(row * k, row * k + k)]
        return pictures.mask_sheet(
            rollout.images[shown],
            [visible_boxes(self.boxes_of(rollout, i), schedule, self.dilation).numpy() for i in shown],
            [pictures.caption(rollout.scenes[i // k].words, rollout.words_read[i], returns[i]) for i in shown],
            [mask[list(rows)].float().numpy() for mask in masks],
        )
