"""The squares of a matrix's input."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..core.stats import Rows, Statistic


class HessianDiagonal(Statistic, name="diagonal"):
    """[in] weighted sum of x²."""

    weighted: ClassVar[bool] = True

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + (rows.x.square() * rows.weights.unsqueeze(1)).sum(dim=0)

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.square()
