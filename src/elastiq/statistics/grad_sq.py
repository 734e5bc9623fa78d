"""Squared gradients of a matrix's weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..core.stats import Rows, Statistic


class GradSq(Statistic, name="grad_sq"):
    """[out, in] sum of g² x² with the gradient g that came back to each output; [0, in] until one did."""

    gradients: ClassVar[bool] = True

    @staticmethod
    def empty(in_features: int, device: torch.device | str) -> Tensor:
        return torch.zeros(0, in_features, device=device)

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        if rows.gradient is None:
            return total
        return GradSq.join(total, rows.gradient.square().T @ rows.x.square())

    @staticmethod
    def join(a: Tensor, b: Tensor) -> Tensor:
        return a + b if a.shape == b.shape else max(a, b, key=Tensor.numel)

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.square()
