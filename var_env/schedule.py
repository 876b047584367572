"""The schedule of token grids, coarse to fine, and the paper's split points (Table 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

NEXTFLOW_PATCH = 16  # px
NEXTFLOW_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)  # Table 6, its last row
NEXTFLOW_RESOLUTIONS = (64, 128, 256, 512, 1024)  # px; each row of Table 6 is the beginning of the next one
SHARES = {"half": 2, "quarter": 4, "eighth": 8}  # of the image's resolution, for `middle_step`


@dataclass(frozen=True)
class ScaleSchedule:
    """T token grids ``r_1..r_T``, laid one after the other on a flat axis of ``L`` tokens, each grid row by row.

    Args:
        grids: ``(h, w)`` of every grid, coarse to fine. The last one is the canvas and no other may exceed it.
        patch: pixels along one side of a token of the canvas; the image is ``(H * patch, W * patch)``.
        canvas: ``(H, W)`` when the grids are no pyramid but the single tokens of a canvas, see `raster`.

    Raises:
        ValueError: no grid, a size below 1, a grid larger than the last one, or a canvas that the grids do not fill.

    Examples:
        >>> schedule = ScaleSchedule([(1, 1), (2, 2), (4, 4)], patch=16)
        >>> len(schedule), schedule.total_tokens, schedule.slices[1]
        (3, 21, slice(1, 5, None))
        >>> schedule.split(resolution=32)
        2
    """

    grids: tuple[tuple[int, int], ...]
    patch: int
    canvas: tuple[int, int]  # (H, W), the token positions of the finished image

    def __init__(self, grids: Iterable[Sequence[int]], patch: int = 16, canvas: tuple[int, int] | None = None) -> None:
        pairs = tuple(tuple(int(side) for side in grid) for grid in grids)
        if not pairs or any(len(grid) != 2 or min(grid) < 1 for grid in pairs):
            raise ValueError(f"a schedule needs at least one grid, each (h, w) with both at least 1, got {pairs}")
        if any(h > pairs[-1][0] or w > pairs[-1][1] for h, w in pairs):
            raise ValueError(f"no grid may be larger than the last one, {pairs[-1]}, got {pairs}")
        if patch < 1:
            raise ValueError(f"patch must be at least 1 pixel, got {patch}")
        if canvas is not None and pairs != ((1, 1),) * (canvas[0] * canvas[1]):
            raise ValueError(f"canvas={canvas} takes one grid of (1, 1) a token, see ScaleSchedule.raster; got {pairs}")
        object.__setattr__(self, "grids", pairs)
        object.__setattr__(self, "patch", int(patch))
        object.__setattr__(self, "canvas", pairs[-1] if canvas is None else (int(canvas[0]), int(canvas[1])))

    @classmethod
    def raster(cls, canvas: Sequence[int], patch: int = 16) -> ScaleSchedule:
        """The schedule of plain autoregressive models: every token of one canvas is a step, row by row.

        Args:
            canvas: ``(H, W)``; T is ``H * W`` and every grid ``(1, 1)``.

        Examples:
            >>> schedule = ScaleSchedule.raster((24, 24))  # Janus-Pro
            >>> len(schedule), schedule.total_tokens, schedule.canvas
            (576, 576, (24, 24))
        """
        if len(canvas) != 2 or min(canvas) < 1:
            raise ValueError(f"canvas must be (H, W), both at least 1, got {canvas}")
        h, w = int(canvas[0]), int(canvas[1])
        return cls([(1, 1)] * (h * w), patch, (h, w))

    @property
    def is_raster(self) -> bool:
        """Whether grid t is the t-th token of the canvas, and not the whole image at a scale of its own."""
        return len(self.grids) > 1 and self.canvas != self.grids[-1]

    @classmethod
    def nextflow(cls, resolution: int, aspect: Sequence[int] = (1, 1)) -> ScaleSchedule:
        """NextFlow's schedule, the paper's Table 6, with a patch of 16 pixels.

        The table has square grids; the paper says that other aspect ratios work and not how. The rule for those is
        ours: the longer side of every grid is the table's and the shorter one follows the ratio, rounded, at least 1
        token. So ``split`` finds the same m whatever the ratio.

        Args:
            resolution: pixels along the longer side, 64, 128, 256, 512 or 1024.
            aspect: height to width, such as ``(9, 16)``; two whole numbers of at least 1.

        Raises:
            ValueError: another resolution, or an aspect ratio of another form.
        """
        if resolution not in NEXTFLOW_RESOLUTIONS:
            available = ", ".join(map(str, NEXTFLOW_RESOLUTIONS))
            raise ValueError(f"Table 6 has no schedule for {resolution} pixels: choose one of {available}")
        if len(aspect) != 2 or min(aspect) < 1 or any(part != int(part) for part in aspect):
            raise ValueError(f"aspect must be (h, w), two whole numbers of at least 1 such as (9, 16), got {aspect}")
        sides = [side for side in NEXTFLOW_SIDES if side * NEXTFLOW_PATCH <= resolution]
        longer = int(max(aspect))
        # Whole numbers, halves up: no grid depends on how a float is rounded.
        scaled = [[max(1, (2 * side * int(part) + longer) // (2 * longer)) for part in aspect] for side in sides]
        return cls(scaled, patch=NEXTFLOW_PATCH)

    def __len__(self) -> int:
        """T, the number of grids."""
        return len(self.grids)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """``n_t = h_t * w_t``, the tokens of each grid."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def total_tokens(self) -> int:
        """``L``, the tokens of all grids together."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each grid lies on the flat axis of L tokens."""
        ends = [sum(self.sizes[: t + 1]) for t in range(len(self))]
        return tuple(slice(end - size, end) for size, end in zip(self.sizes, ends, strict=True))

    @cached_property
    def bands(self) -> tuple[tuple[str, range], ...]:
        """What people look at one by one, as a name and its steps: each grid, or each row of a raster.

        Examples:
            >>> ScaleSchedule([(1, 1), (2, 2)]).bands
            (('1_1x1', range(0, 1)), ('2_2x2', range(1, 2)))
            >>> ScaleSchedule.raster((2, 3)).bands
            (('row_1', range(0, 3)), ('row_2', range(3, 6)))
        """
        if not self.is_raster:
            return tuple((f"{t + 1}_{h}x{w}", range(t, t + 1)) for t, (h, w) in enumerate(self.grids))
        rows, columns = self.canvas
        return tuple((f"row_{row + 1}", range(row * columns, (row + 1) * columns)) for row in range(rows))

    def split(self, resolution: int) -> int:
        """The middle step m: how many grids the prefix has when its last one first shows ``resolution`` pixels.

        A grid shows its longer side times ``patch``. This is the paper's Table 6, where the patch is 16 pixels: the
        256-pixel prefix of the 1024-pixel schedule ends with the (16, 16) grid, so ``m_256 = 12``.

        Raises:
            ValueError: no grid shows that resolution; the message lists those that the schedule has. A raster schedule
                has none: its steps show parts of the image, and not the whole at a lower resolution.
        """
        if self.is_raster:
            raise ValueError(
                f"a raster schedule has no resolution of {resolution} pixels to split at: give the number of tokens in "
                f"the prefix, 1 to {len(self)}"
            )
        resolutions = [max(grid) * self.patch for grid in self.grids]
        if resolution not in resolutions:
            available = ", ".join(str(r) for r in sorted(set(resolutions)))
            raise ValueError(f"no grid of this schedule shows {resolution} pixels: choose one of {available}")
        return resolutions.index(resolution) + 1

    def middle_step(self, split: int | str) -> int:
        """The middle step m, however it was given.

        Args:
            split: a whole number from 1 to T is m itself, the number of grids in the prefix, and a larger one a
                resolution for ``split``. ``"m_128"`` is the resolution in any case, as the paper writes it: in
                the 1024-pixel schedule 16 is a number of grids, and ``"m_16"`` the first of them. ``"half"``,
                ``"quarter"`` and ``"eighth"`` are the first grid that shows at least this share of the image's
                resolution, or that share of a raster's tokens.

        Raises:
            ValueError: neither; the message lists what the schedule has.
        """
        sizes = () if self.is_raster else tuple(max(grid) * self.patch for grid in self.grids)
        resolutions = {f"m_{size}": size for size in sizes}
        if split in SHARES and self.is_raster:
            return -(-len(self) // SHARES[split])
        if split in SHARES:
            return next(m for m, grid in enumerate(self.grids, 1) if SHARES[split] * max(grid) >= max(self.grids[-1]))
        if isinstance(split, str) and split in resolutions:
            return self.split(resolutions[split])
        if isinstance(split, int) and 1 <= split <= len(self):
            return split
        if isinstance(split, int) and split in resolutions.values():
            return self.split(split)
        raise ValueError(
            f"split must be the number of prefix grids, 1 to {len(self)}, or the prefix's resolution in pixels, "
            f"one of {', '.join([*SHARES, *resolutions])}; got {split!r}"
        )

    def split_grids(self, flat: Tensor) -> list[Tensor]:
        """Cut ``(B, L, ...)`` into T views ``(B, n_t, ...)``."""
        if flat.shape[1] != self.total_tokens:
            raise ValueError(f"the flat axis must hold L = {self.total_tokens} tokens, got {tuple(flat.shape)}")
        return list(flat.split(self.sizes, dim=1))

    @staticmethod
    def join(grids: Sequence[Tensor]) -> Tensor:
        """Lay grids ``(B, n_t, ...)`` one after the other, ``(B, sum n_t, ...)``; the inverse of ``split_grids``."""
        return torch.cat(list(grids), dim=1)
