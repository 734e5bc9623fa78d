"""The absolute size of a matrix's input."""

from __future__ import annotations

from torch import Tensor

from ..core.stats import Rows, Statistic


class AbsMean(Statistic, name="abs_mean"):
    """[in] weighted sum of |x|."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + rows.weights @ rows.x.abs()

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.abs()
