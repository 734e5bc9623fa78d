"""NF4 and FP4 as QLoRA stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import ElastiqError, Format, Stats, storage
from ..parts import TableGrid, values
from ..parts.fitting import group_columns, largest


@dataclass(frozen=True)
class NormalFloat(Format, name="normal-float"):
    """Four bits on the quantiles of a normal distribution, absolute maximum per block (QLoRA, 2305.14314, section 3).

    number: `nf4` or bitsandbytes' `fp4`. scales: `double` (8-bit dynamic floats, the paper's double quantization),
    `float` or any other storage. A block ends with its row; bitsandbytes' blocks run on across rows, which is the same
    where the block size divides the row. Codes are the nearest under the scales as they are stored; bitsandbytes
    chooses them before it rounds the scales.
    """

    number: str = "nf4"
    group_size: int = 64
    scales: str = "double"

    bits: ClassVar[tuple[int, int]] = (4, 4)

    def __post_init__(self) -> None:
        if self.number not in ("nf4", "fp4"):
            raise ElastiqError(f"normal-float: number={self.number!r} is neither nf4 nor fp4")
        if self.group_size != -1 and not 8 <= self.group_size <= 4096:
            raise ElastiqError(f"normal-float: group_size={self.group_size} must be 8 to 4096, or -1 for the whole row")
        storage(self.scales)

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        return (4,)

    def overhead(self, in_features: int) -> int:
        return storage(self.scales).row_bits(-(-in_features // group_columns(self.group_size, in_features)))

    def fit(self, weight: Tensor, stats: Stats) -> TableGrid:
        size = group_columns(self.group_size, weight.shape[1])
        scale = largest(weight, size) / float(values(self.number).max())
        arrays = {4: storage(self.scales).encode(scale.clamp_min(1e-30))}
        return TableGrid(self.levels, size, (len(weight), weight.shape[1]), (self.number,), self.scales, scales=arrays)
