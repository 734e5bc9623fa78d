"""A nested matrix as the products read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core import ElastiqError
from .tiles import INPUTS, ROWS


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """The first planes of a matrix [out_features, in_features] in tile order, with the scales of one level.

    planes: uint8 [blocks, tiles, 16, 4], most significant first; their number is the width read.
    scale, zero_point: float16 [blocks, groups, 16] of `level`, from which the width's own are derived; no zero point
    means the middle of the range. group_size: inputs per scale.
    """

    planes: Sequence[Tensor]
    scale: Tensor
    zero_point: Tensor | None
    level: int
    out_features: int
    in_features: int
    group_size: int

    @property
    def bits(self) -> int:
        return len(self.planes)

    @property
    def whole_tiles(self) -> bool:
        """Whether no tile crosses from one group to the next."""
        return self.group_size % INPUTS == 0 or self.group_size >= self.in_features

    def check(self) -> None:
        """Raise ElastiqError unless every array has exactly the type, size and place that a kernel will read."""
        blocks = -(-self.out_features // ROWS)
        plane_size = blocks * -(-self.in_features // INPUTS) * ROWS * 4
        scale_size = blocks * -(-self.in_features // self.group_size) * ROWS
        device = self.scale.device
        if not 1 <= len(self.planes) <= 8 or not 1 <= self.level <= 8:
            raise ElastiqError(f"matmul: {len(self.planes)} planes with scales of {self.level} bits; both are 1 to 8")
        for plane in self.planes:
            if plane.dtype != torch.uint8 or plane.numel() != plane_size or not plane.is_contiguous():
                raise ElastiqError(
                    f"matmul: a plane is {plane.dtype} {list(plane.shape)}, not {plane_size} contiguous bytes in tile "
                    f"order, as [{self.out_features}, {self.in_features}] needs"
                )
            if plane.device != device:
                raise ElastiqError(f"matmul: a plane is on {plane.device}, the scales are on {device}")
        for scale in (self.scale, self.zero_point):
            if scale is not None and (
                scale.dtype != torch.float16 or scale.numel() != scale_size or not scale.is_contiguous()
            ):
                raise ElastiqError(
                    f"matmul: a scale is {scale.dtype} {list(scale.shape)}, not {scale_size} contiguous float16 in "
                    f"tile order, as groups of {self.group_size} need"
                )
