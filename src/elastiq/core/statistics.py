"""The statistics that steps ask for so far. One that a single step needs may as well stand beside that step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .stats import Rows, Statistic

PANEL = 512
"""Columns of a Hessian computed together."""


class Hessian(Statistic, name="hessian"):
    """[in, in] weighted sum of x xᵀ, no factor 2."""

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


class HessianDiagonal(Statistic, name="diagonal"):
    """[in] weighted sum of x²."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + (rows.x.square() * rows.weights.unsqueeze(1)).sum(dim=0)

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.square()


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


class AbsMean(Statistic, name="abs_mean"):
    """[in] weighted sum of |x|."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + rows.weights @ rows.x.abs()

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale.abs()


class Mean(Statistic, name="mean"):
    """[in] weighted sum of x."""

    @staticmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        return total + rows.weights @ rows.x

    @staticmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        return total / scale


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
