"""Bias correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Compensator, SideTerm, Stats, to_half
from ..parts import Shift


@dataclass(frozen=True)
class BiasCorrection(Compensator, name="bias"):
    """Adds the mean of what is lost, (W - Q) E[x], to the output (data-free quantization, DFQ, 1906.04721, section 4.2,
    with the mean measured instead of derived). 16 bits per output and level.

    The mean is weighted as all statistics are (`Recipe.token_weights`): the constant that leaves the least weighted
    error, which is the plain mean where every token weighs the same.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mean"})
    shifts: ClassVar[bool] = True

    def fit(self, residual: Tensor, stats: Stats, level: int) -> tuple[SideTerm, ...]:
        mean = stats.get("mean")
        if mean is None:
            return ()
        amount = residual @ (mean / stats.total).to(residual)
        return (Shift(to_half(amount).half(), residual.shape[1], level),)
