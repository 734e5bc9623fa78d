"""Small floats with one scale per group or row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import LEAST, MIN_SCALE, ElastiqError, Format, Stats, storage
from ..parts import TableGrid, bits_of, values
from ..parts.fitting import fit_scales, group_columns


@dataclass(frozen=True)
class Minifloat(Format, name="minifloat"):
    """Floats of any exponent and mantissa width (FP8, 2209.05433; FP6-LLM, 2401.14112) under a scale.

    number: `e4m3fn`, `e5m2ieee`, `e3m4`, `e2m3`, `e3m2`, `e2m1`, ...; see `terms.values`. group_size: as in `integer`.
    scales: how they are stored. clip: search the part of the range to keep by squared error weighted with the Hessian's
    diagonal; otherwise the largest weight of a group becomes the largest number.
    """

    number: str = "e4m3fn"
    group_size: int = -1
    scales: str = "half"
    clip: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})
    bits: ClassVar[tuple[int, int]] = (2, 8)

    def __post_init__(self) -> None:
        if self.group_size != -1 and not 8 <= self.group_size <= 256:
            raise ElastiqError(f"minifloat: group_size={self.group_size} must be 8 to 256, or -1 for the whole row")
        bits_of(self.number), storage(self.scales)

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        return (bits_of(self.number),)

    @property
    def least(self) -> float:
        return LEAST * max(float(values(self.number).max()) / 448, 1.0)  # E5M2's scales are 128 times as small

    def overhead(self, in_features: int) -> int:
        return storage(self.scales).row_bits(-(-in_features // group_columns(self.group_size, in_features)))

    def fit(self, weight: Tensor, stats: Stats) -> TableGrid:
        size = group_columns(self.group_size, weight.shape[1])
        importance = stats.mean_diagonal(weight.shape[1]).to(weight.device)
        scale = fit_scales(weight, importance, size, self.number, self.clip).clamp_min(MIN_SCALE)
        arrays = {self.levels[0]: storage(self.scales).encode(scale)}
        return TableGrid(self.levels, size, (len(weight), weight.shape[1]), (self.number,), self.scales, scales=arrays)
