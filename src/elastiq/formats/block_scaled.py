"""Blocks of small numbers under a shared small scale: MX and NV formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Format, Stats, storage
from ..parts import TableGrid, bits_of, values
from ..parts.fitting import group_columns, largest


@dataclass(frozen=True)
class BlockScaled(Format, name="block-scaled"):
    """Blocks as defined by OCP MX v1.0 (MX, 2310.10537) and NVFP4, with the integer ones of INT-v.s.-FP, 2510.25602.

    number: of `terms.values`; block_size: 32 in MX, 16 in NV. scales: `e8m0`, the power of two that brings the block's
    largest weight into the number's top exponent (MX v1.0, section 6.3: 2^(floor(log2 max) - emax), saturating), or
    `e4m3`: largest weight over largest number, in FP8 under one float32 of the matrix (NV). Integers are taken as
    fractions k / 2^(bits - 2), so that their emax is 0 (MXINT8). The INT-v.s.-FP study rounds e8m0 scales up, those of
    its floats too, so that nothing saturates; so does this with `round_up`.
    """

    number: str = "e2m1"
    block_size: int = 32
    scales: str = "e8m0"
    round_up: bool = False

    bits: ClassVar[tuple[int, int]] = (4, 8)

    def __post_init__(self) -> None:
        if not 8 <= self.block_size <= 256:
            raise ElastiqError(f"block-scaled: block_size={self.block_size} must be 8 to 256; MX has 32, NV 16")
        bits_of(self.number), storage(self.scales)

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        return (bits_of(self.number),)

    def overhead(self, in_features: int) -> int:
        return storage(self.scales).row_bits(-(-in_features // self.block_size))

    def fit(self, weight: Tensor, stats: Stats) -> TableGrid:
        size = group_columns(self.block_size, weight.shape[1])
        top, most = largest(weight, size).double(), float(values(self.number).abs().max())
        scale = top / most
        if self.scales == "e8m0":
            exponent = torch.log2(scale).ceil() if self.round_up else floor_log2(top) - floor_log2(torch.tensor(most))
            scale = torch.exp2(exponent.clamp_min(-127))
        arrays = {self.levels[0]: storage(self.scales).encode(scale.float())}
        return TableGrid(self.levels, size, (len(weight), weight.shape[1]), (self.number,), self.scales, scales=arrays)


def floor_log2(x: Tensor) -> Tensor:
    """Exponent of positive numbers, exactly; -inf of 0."""
    return torch.where(x > 0, torch.frexp(x).exponent.double() - 1, -torch.inf)
