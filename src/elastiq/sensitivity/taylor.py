"""First order, with signs, and second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class TaylorTerm(Sensitivity, name="taylor"):
    """|sum of g (Q - W)| + 1/2 sum of F (Q - W)²: the loss's Taylor expansion around the weights (the Taylor measure of
    CPTQuant, 2412.03599, TDMPQ, which expands in a layer's input instead), F the diagonal empirical Fisher."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "gradient", "fisher"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.gradient is not None and matrix.fisher is not None
        losses = {}
        for level in matrix.levels:
            change = matrix.change(level)
            first, second = (matrix.gradient * change).sum().abs(), (matrix.fisher * change.square()).sum()
            losses[level] = float(first + 0.5 * second)
        return non_increasing(losses)
