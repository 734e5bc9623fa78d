"""What a transform did to a matrix: an invertible map of its input, as data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .part import Part
from .stats import Stats


class Fold(Part):
    """An invertible linear map T of a matrix's input: W x = (W T⁻¹) (T x).

    The weight takes its side before it is quantized; the other is taken by what comes before the matrix if it can, and
    by the runtime, on what the matrix is given, otherwise.
    """

    @abstractmethod
    def channels(self) -> int:
        """Number of channels of the input."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """T x for rows x [..., in], in their dtype."""

    @abstractmethod
    def into(self, weight: Tensor) -> Tensor:
        """W T⁻¹ of `weight` [out, in] float32: what is quantized."""

    @abstractmethod
    def out_of(self, weight: Tensor) -> Tensor:
        """W of W T⁻¹ [out, in]: what the matrix does to inputs that were not transformed."""

    def divisor(self) -> Tensor | None:
        """[in] by which T divides each channel, where that is all it does: what comes before may do it instead."""
        return None

    def rotation(self) -> tuple[Tensor, Tensor] | None:
        """Factors f [in] and symmetric R [size, size], float32, if T x = (H ⊗ R)(f x), H the Walsh-Hadamard matrix of
        in / size (ones and minus ones): what a compiled decoder can do to a token on its way."""
        return None

    @abstractmethod
    def stats(self, stats: Stats) -> Stats:
        """Statistics of T x, those fields of them that follow from the ones of x."""


def fold_in(folds: Sequence[Fold], weight: Tensor) -> Tensor:
    """`weight` [out, in] after all folds, the first one first."""
    for fold in folds:
        weight = fold.into(weight)
    return weight


def fold_out(folds: Sequence[Fold], weight: Tensor) -> Tensor:
    """The inverse of `fold_in`."""
    for fold in reversed(folds):
        weight = fold.out_of(weight)
    return weight
