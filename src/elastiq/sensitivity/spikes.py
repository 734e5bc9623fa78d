"""Matrices whose input has spikes stay wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class ActivationSpikes(Sensitivity, name="spikes"):
    """The relative output error, `weight` times as much for a matrix whose input has a spike, so that it is pinned high
    (mixed precision that is Spike-aware, 2504.21553, which keeps the projections that its authors found
    spiking in high precision; here they are found by looking).

    ratio: a spike is a channel whose largest |x| exceeds the median channel's by this factor.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "stats"})

    ratio: float = 50.0
    weight: float = 100.0

    def measure(self, matrix: Evidence) -> dict[int, float]:
        largest = None if matrix.stats is None else matrix.stats.get("abs_max")
        spiking = largest is not None and bool(largest.max() > self.ratio * largest.median())
        factor = self.weight if spiking else 1.0
        return non_increasing({level: factor * matrix.error(level) for level in matrix.levels})
