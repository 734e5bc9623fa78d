"""The second moment of a matrix's input."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.stats import Rows, Statistic

PANEL = 512
"""Columns of a Hessian computed together."""


class Hessian(Statistic, name="hessian"):
    """[in, in] weighted sum of x xᵀ, no factor 2."""

    weighted: ClassVar[bool] = True

    @staticmethod
    def empty(in_features: int, device: torch.device | str) -> Tensor:
        return torch.zeros(in_features, in_features, device=device)

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        """Only what is on and above the diagonal is computed."""
        x = rows.x * rows.weights.sqrt().unsqueeze(1)
        for first in range(0, len(total), PANEL):
            last = first + PANEL
            total[first:last, first:].addmm_(x[:, first:last].T, x[:, first:])
            total[last:, first:last] = total[first:last, last:].T
        return total

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / (scale * scale[:, None])
