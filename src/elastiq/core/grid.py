"""The numbers that codes stand for, at every level."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .error import ElastiqError
from .scales import decode_level, encode_level, storage
from .term import Term

MAX_BITS = 8


def derive(scale: Tensor, zero_point: Tensor, from_level: int, to_level: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `to_level` bits that keep every cell of `from_level` centred.

    A wider level divides each cell evenly, a narrower one takes the middle of the cells it joins.
    """
    factor = 2.0 ** (from_level - to_level)
    return scale * factor, (zero_point + 0.5) / factor - 0.5


class CodeGrid(ABC):
    """What the codes of a matrix stand for, in any format.

    levels: widths with values of their own, ascending; the last is the width of the codes.
    """

    levels: tuple[int, ...]

    @property
    def bits(self) -> int:
        return self.levels[-1]

    @abstractmethod
    def quantize(self, weight: Tensor, first: int = 0) -> Tensor:
        """Codes uint8 nearest to `weight` [out, columns] at the top level; its columns begin at channel `first`."""

    @abstractmethod
    def dequantize(self, codes: Tensor, level: int, first: int = 0) -> Tensor:
        """Values float32 of top-level `codes` [out, columns] read at `level` bits."""

    @abstractmethod
    def term(self, codes: Tensor) -> Term:
        """The matrix with these top-level codes uint8 [out, in]."""


@dataclass(frozen=True)
class Grid(CodeGrid):
    """Affine levels: value = scale[level] * (code[level] - zero_point[level]), code[level] = the top `level` bits.

    levels: widths with a scale of their own, ascending; the last is the width of the stored codes.
    group_size: input channels per scale; the last group of a row may be shorter.
    scale, zero_point: [levels, out, groups] float32 holding half-precision values.
    symmetric: the zero point is the middle of the range, (2^level - 1) / 2, and is not stored.
    scales: how they are stored (`scales.storage`).
    """

    levels: tuple[int, ...]
    group_size: int
    scale: Tensor
    zero_point: Tensor
    symmetric: bool = False
    scales: str = "half"

    def parameters(self, level: int) -> tuple[Tensor, Tensor]:
        """(scale, zero_point), each [out, groups], of any level from 1 to `bits`; derived from the nearest lower
        level that has its own (from the lowest, below it)."""
        if not 1 <= level <= self.bits:
            raise ElastiqError(f"level {level} is not between 1 and {self.bits}")
        own = max((r for r in self.levels if r <= level), default=self.levels[0])
        index = self.levels.index(own)
        if own == level:
            return self.scale[index], self.zero_point[index]
        return derive(self.scale[index], self.zero_point[index], own, level)

    def quantize(self, weight: Tensor, first: int = 0) -> Tensor:
        scale, zero = self._columns(self.bits, first, weight.shape[1])
        return (weight / scale + zero).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def dequantize(self, codes: Tensor, level: int, first: int = 0) -> Tensor:
        scale, zero = self._columns(level, first, codes.shape[1])
        return scale * ((codes >> (self.bits - level)).float() - zero)

    def term(self, codes: Tensor) -> Codes:
        return Codes(codes, self)

    def num_bits(self, level: int) -> int:
        """Stored bits of the scales and zero points that a reader of `level` needs."""
        rows, groups = self.scale.shape[1:]
        return (1 if self.symmetric else 2) * rows * storage(self.scales).row_bits(groups)

    def arrays(self, level: int) -> dict[str, Tensor]:
        """What is stored for one of `levels`, by short name."""
        index = self.levels.index(level)
        zero_point = None if self.symmetric else self.zero_point[index]
        return encode_level(self.scales, level, self.scale[index], zero_point)

    def stored(self, scales: str) -> Grid:
        """The same with its scales and zero points as a reader sees them when they are stored as `scales` says."""
        changed = replace(self, scales=scales, scale=self.scale.clone(), zero_point=self.zero_point.clone())
        for index, level in enumerate(self.levels):
            scale, zero_point = decode_level(
                scales, level, changed.arrays(level), self.scale.shape[2], self.symmetric
            )
            changed.scale[index] = scale.float()
            if zero_point is not None:
                changed.zero_point[index] = zero_point.float()
        return changed

    def _columns(self, level: int, first: int, width: int) -> tuple[Tensor, Tensor]:
        scale, zero = self.parameters(level)
        group = torch.arange(first, first + width, device=scale.device) // self.group_size
        return scale[:, group], zero[:, group]


@dataclass(frozen=True)
class Codes(Term):
    """Nested integer codes uint8 [out, in] on a grid: the top r bits are the code of level r.

    Stored as bit planes that kernels read; every other term is a `SideTerm`.
    """

    codes: Tensor
    grid: Grid

    def dense(self, level: int) -> Tensor:
        return self.grid.dequantize(self.codes, level)

    def num_bits(self, level: int) -> int:
        rows, columns = self.codes.shape
        return rows * 8 * -(-columns // 8) * level + self.grid.num_bits(level)  # planes of whole bytes
