"""Integers with a scale and a fractional zero point per group and level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import MAX_BITS, ElastiqError, Format, Grid, Stats, mean, storage
from ..linalg import columns


@dataclass(frozen=True)
class Integer(Format, name="integer"):
    """Uniform levels, value = scale * (code - zero_point), both stored in half precision per group and level.

    levels: widths with scales of their own, ascending, 1 to 8; codes have the last one's width.
    group_size: 16 to 256 input channels, or -1 for the whole row; the last group of a row may be shorter.
    symmetric: the range is +-max and the zero point the middle of it, which costs no storage.
    scales: how scales and zero points are stored: `half`; `int6`, in about 8 bits, second-level quantized (SpQR,
        2306.03078, section 4); `e4m3-row`, in 8-bit floats. They are rounded after the solver, which narrow levels
        hardly notice, and wide ones a little.

    `fit` searches how far to clip each group's range, weighing squared errors by the Hessian's diagonal
    (the search of AWQ, 2306.00978, and OmniQuant, 2308.13137, without gradient, on the range itself).
    """

    levels: tuple[int, ...] = (2, 3, 4, 6, 8)
    group_size: int = 64
    symmetric: bool = False
    scales: str = "half"

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})

    def __post_init__(self) -> None:
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise ElastiqError(f"integer: levels={self.levels} must be distinct and ascend, such as 2,3,4,6,8")
        if self.levels[0] < 1 or self.levels[-1] > MAX_BITS:
            raise ElastiqError(f"integer: levels={self.levels} must lie between 1 and {MAX_BITS}")
        if self.group_size != -1 and not 16 <= self.group_size <= 256:
            raise ElastiqError(f"integer: group_size={self.group_size} must be 16 to 256, or -1 for the whole row")
        if not storage(self.scales).row(1):
            raise ElastiqError(f"integer: scales={self.scales!r} does not store each row by itself; use half or int6")

    def overhead(self, in_features: int) -> int:
        groups = -(-in_features // self._columns_per_group(in_features))
        return (1 if self.symmetric else 2) * storage(self.scales).row_bits(groups)

    def fit(self, weight: Tensor, stats: Stats) -> Grid:
        if weight.dim() == 2:
            weight = weight.unsqueeze(0).expand(len(self.levels), -1, -1)
        width = weight.shape[-1]
        size = self._columns_per_group(width)
        importance = stats.mean_diagonal(width).to(weight.device)
        importance = importance / max(mean(importance), torch.finfo(torch.float32).tiny)
        weight = weight.permute(2, 0, 1).contiguous()
        fitted = [
            columns.fit(part, share, self.levels, self.symmetric)
            for part, share in zip(weight.split(size), importance.split(size), strict=True)
        ]
        scale, zero = (torch.stack(part, dim=-1) for part in zip(*fitted, strict=True))
        grid = Grid(self.levels, size, scale, zero, self.symmetric)
        return grid if self.scales == "half" else grid.stored(self.scales)

    def _columns_per_group(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else min(self.group_size, in_features)
