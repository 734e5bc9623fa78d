"""The largest input of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.stats import Rows, Statistic


class AbsMax(Statistic, name="abs_max"):
    """[in] largest |x|."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return torch.maximum(total, rows.x.abs().amax(dim=0))

    @staticmethod
    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.abs()
