"""From a sum of losses to a KL divergence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import ElastiqError
from .losses import Measurement, Stored
from .table import Floats, Table

_LEAST = 1e-12


@dataclass(frozen=True)
class Prediction:
    """The curve through the uniform maps' (predicted loss, measured KL divergence), straight in logarithms.

    Losses of matrices do not quite add, least at few bits, and most sensitivities are in no unit of damage; the curve
    corrects both where uniform maps were measured. Without them a KL-based loss stands for itself, any other is
    unknown (None).
    """

    losses: tuple[float, ...]
    kls: tuple[float, ...]
    own_unit: bool

    @staticmethod
    def of(table: Table, loss: Floats, measurement: Measurement, stored: Stored) -> Prediction:
        points = [
            (max(float(loss[:, index].sum()), _LEAST), max(stored.uniform[level].kl, _LEAST))
            for index, level in enumerate(table.levels)
            if level in stored.uniform
        ]
        points = [point for point in sorted(set(points)) if point[0] > _LEAST]
        kept = tuple(p for i, p in enumerate(points) if not i or p[0] > points[i - 1][0])
        return Prediction(tuple(p[0] for p in kept), tuple(p[1] for p in kept), measurement.name == "kl")

    def kl(self, loss: float) -> float | None:
        """KL divergence in nats per token, None where nothing was measured."""
        if len(self.losses) < 2:
            return loss if self.own_unit else None
        x, y = np.log(self.losses), np.maximum.accumulate(np.log(self.kls))
        at = np.log(max(loss, _LEAST))
        if at < x[0]:  # in proportion below the widest uniform map
            return float(np.exp(y[0] + at - x[0]))
        return float(np.exp(np.interp(at, x, y)))

    def loss_at(self, kl: float) -> float:
        """The largest loss whose predicted KL divergence is at most `kl`. Raises ElastiqError where it is unknown."""
        if not kl > 0:
            raise ElastiqError(f"max damage: kl={kl:g} is not a positive number")
        if len(self.losses) < 2:
            if self.own_unit:
                return kl
            raise ElastiqError(
                "max damage: nothing measured says what a loss means; run elastiq sensitivity CHECKPOINT --text FILE"
            )
        low, high = _LEAST, max(self.losses) * 1e6
        for _ in range(200):
            middle = float(np.sqrt(low * high))
            predicted = self.kl(middle)
            low, high = (middle, high) if predicted is not None and predicted <= kl else (low, middle)
        return low
