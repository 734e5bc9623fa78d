"""First order, without signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class GradientMagnitude(Sensitivity, name="gradient"):
    """Sum of |g (Q - W)| with the mean gradient g: weights of large gradient must stay (GWQ, 2411.00850,
    which keeps single such weights in high precision; here their matrix gets the bits)."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "gradient"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.gradient is not None
        return non_increasing(
            {level: float((matrix.gradient * matrix.change(level)).abs().sum()) for level in matrix.levels}
        )
