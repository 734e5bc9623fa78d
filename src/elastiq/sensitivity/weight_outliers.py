"""How many weights stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class WeightOutliers(Sensitivity, name="weight-outliers"):
    """Share of weights more than one standard deviation above the mean (z-score distribution, ZD, of
    Layer-Wise-Quantization, 2406.17415), times the relative output error. The paper takes it over whole blocks."""

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "weight"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.weight is not None
        weight = matrix.weight
        score = float((weight > weight.mean() + weight.std()).float().mean())
        return non_increasing({level: score * matrix.error(level) for level in matrix.levels})
