"""The additive parts a quantized matrix is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .grid import Grid


class Term(ABC):
    """One additive part of a matrix."""

    @abstractmethod
    def dense(self, level: int) -> Tensor:
        """[out, in] float32 as read at `level` bits."""

    @abstractmethod
    def num_bits(self, level: int) -> int:
        """Stored bits that a reader of `level` needs, everything included."""


@dataclass(frozen=True)
class Codes(Term):
    """Nested integer codes uint8 [out, in] on a grid: the top r bits are the code of level r."""

    codes: Tensor
    grid: Grid

    def dense(self, level: int) -> Tensor:
        return self.grid.dequantize(self.codes, level)

    def num_bits(self, level: int) -> int:
        return self.codes.numel() * level + self.grid.num_bits(level)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as the sum of its terms, most important first."""

    terms: tuple[Term, ...]

    def dequantize(self, level: int) -> Tensor:
        """[out, in] float32 at `level` bits."""
        total = self.terms[0].dense(level)
        for term in self.terms[1:]:
            total = total + term.dense(level)
        return total

    def num_bits(self, level: int) -> int:
        return sum(term.num_bits(level) for term in self.terms)
