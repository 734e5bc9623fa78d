"""Curvature from squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class EmpiricalFisher(Sensitivity, name="fisher"):
    """1/2 sum of F (Q - W)², F the mean squared gradient of every weight (LQ-LoRA, 2311.12023; the loss's
    second order term with the diagonal empirical Fisher for its Hessian)."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "fisher"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.fisher is not None
        return non_increasing(
            {level: 0.5 * float((matrix.fisher * matrix.change(level).square()).sum()) for level in matrix.levels}
        )
