"""The additive parts a quantized matrix is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from .fold import Fold, fold_in, fold_out
from .part import Part
from .powers import RowPowers


class Term(ABC):
    """One additive part of a matrix."""

    @abstractmethod
    def dense(self, level: int) -> Tensor:
        """[out, in] float32 as read at `level` bits."""

    @abstractmethod
    def num_bits(self, level: int) -> int:
        """Stored bits that a reader of `level` needs, everything included."""


class SideTerm(Term, Part):
    """A term that is not integer codes (`Codes`): of a kind of its own, stored as arrays.

    A matrix may consist of such terms alone.
    """

    def product(self, x: Tensor, level: int) -> Tensor:
        """[..., out] that the term adds for x [..., in], in the dtype of x."""
        return F.linear(x, self.dense(level).to(x.dtype))

    def shift(self, level: int) -> Tensor | None:
        """[out] that the term adds whatever the input is."""
        return None

    def num_bits(self, level: int) -> int:
        return Part.num_bits(self, level)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix as the sum of its terms, most important first, behind the folds of its input, the first one first, all
    of it times the powers of two of its rows, if it has any."""

    terms: tuple[Term, ...]
    folds: tuple[Fold, ...] = ()
    powers: RowPowers | None = None

    def dequantize(self, level: int) -> Tensor:
        """[out, in] float32 at `level` bits."""
        return self.around(self.terms[0].dense(level), level)

    def around(self, values: Tensor, level: int) -> Tensor:
        """[out, in] at `level` bits, `values` [out, in] in the place of the first term's."""
        for term in self.terms[1:]:
            values = values + term.dense(level)
        values = fold_out(self.folds, values)
        return values if self.powers is None else self.powers.out_of(values)

    def inside(self, weight: Tensor) -> Tensor:
        """What the terms have to add up to where the whole is to be `weight` [out, in]."""
        weight = fold_in(self.folds, weight)
        return weight if self.powers is None else self.powers.into(weight)

    def with_first(self, term: Term) -> QuantizedWeight:
        """The same with another first term."""
        return replace(self, terms=(term, *self.terms[1:]))

    def shift(self, level: int) -> Tensor | None:
        """[out] added to the output whatever the input is, None for nothing."""
        shifts = [term.shift(level) for term in self.terms if isinstance(term, SideTerm)]
        found = [shift for shift in shifts if shift is not None]
        if not found:
            return None
        whole = sum(found[1:], found[0])
        return whole if self.powers is None else whole * self.powers.factor

    def num_bits(self, level: int) -> int:
        parts = (*self.terms, *self.folds, *(() if self.powers is None else (self.powers,)))
        return sum(part.num_bits(level) for part in parts)
