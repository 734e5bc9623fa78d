"""The sum of a matrix's input."""

from __future__ import annotations

from torch import Tensor

from ..core.stats import Rows, Statistic


class Mean(Statistic, name="mean"):
    """[in] weighted sum of x."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + rows.weights @ rows.x

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale
