"""A nested matrix as the products read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import ElastiqError
from ...linalg import native
from .tiles import INPUTS, ROWS


class _Fields(NamedTuple):
    planes: Sequence[Tensor]
    scale: Tensor
    zero_point: Tensor | None
    level: int
    out_features: int
    in_features: int
    group_size: int


class TiledWeight(_Fields):
    """The first planes of a matrix [out_features, in_features] in tile order, with the scales of one level.

    planes: uint8 [blocks, tiles, 16, 4], most significant first; their number is the width read.
    scale, zero_point: float16 [blocks, groups, 16] of `level`, from which the width's own are derived; no zero point
    means the middle of the range. group_size: inputs per scale.
    """

    @property
    def bits(self) -> int:
        return len(self.planes)

    @cached_property
    def whole_tiles(self) -> bool:
        """Whether no tile crosses from one group to the next."""
        return self.group_size % INPUTS == 0 or self.group_size >= self.in_features

    @cached_property
    def handle(self) -> Any:
        """The matrix as compiled code takes it: addresses, so the arrays must outlive its use.

        Made once, after `check`; a copy or a pickle makes its own.
        """
        self.check()
        zero_point = 0 if self.zero_point is None else self.zero_point.data_ptr()
        planes = tuple([plane.data_ptr() for plane in self.planes])
        return native.module.Matrix((planes, self.scale.data_ptr(), zero_point, *self[3:]))  # type: ignore[union-attr]

    def __getstate__(self) -> None:
        return None

    def check(self) -> None:
        """Raise ElastiqError unless every array has exactly the type, size and place that compiled code will read."""
        planes, scale, zero_point, level, out_features, in_features, group_size = self
        blocks = -(-out_features // ROWS)
        plane_size = blocks * -(-in_features // INPUTS) * ROWS * 4
        scale_size = blocks * -(-in_features // group_size) * ROWS
        if not 1 <= len(planes) <= 8 or not 1 <= level <= 8:
            raise ElastiqError(f"matmul: {len(planes)} planes with scales of {level} bits; both are 1 to 8")
        for plane in planes:
            if plane.numel() != plane_size or plane.dtype != torch.uint8 or not _plain(plane):
                raise ElastiqError(
                    f"matmul: a plane is {plane.dtype} {list(plane.shape)}, not {plane_size} contiguous bytes in tile "
                    f"order, as [{out_features}, {in_features}] needs"
                )
        for grid in (scale,) if zero_point is None else (scale, zero_point):
            if grid.numel() != scale_size or grid.dtype != torch.float16 or not _plain(grid):
                raise ElastiqError(
                    f"matmul: a scale is {grid.dtype} {list(grid.shape)}, not {scale_size} contiguous float16 in "
                    f"tile order, as groups of {group_size} need"
                )


def _plain(array: Tensor) -> bool:
    return array.is_contiguous() and array.is_cpu
