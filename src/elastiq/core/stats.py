"""What calibration learns about the input of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .error import ElastiqError

PANEL = 512
"""Columns of a Hessian computed together."""
FIELDS = frozenset({"hessian", "diagonal", "abs_max", "abs_mean", "mean", "grad_sq"})


@dataclass
class Stats:
    """Sums over the rows x [in] that reached a matrix; only the fields a recipe asks for are kept.

    count: rows seen; dropped: rows left out because they held NaN or infinity. total: sum of the rows' weights.
    hessian [in, in]: weighted sum of x xᵀ, float32, no factor 2. diagonal [in]: weighted sum of x². abs_max [in]:
    largest |x|. mean, abs_mean [in]: weighted sums of x and |x|. grad_sq [out, in]: sum of g² x² with the gradient g
    that came back to each output; empty until one did.
    """

    count: int = 0
    total: float = 0.0
    dropped: int = 0
    hessian: Tensor | None = None
    diagonal: Tensor | None = None
    abs_max: Tensor | None = None
    mean: Tensor | None = None
    abs_mean: Tensor | None = None
    grad_sq: Tensor | None = None

    @staticmethod
    def empty(in_features: int, needs: frozenset[str] = FIELDS, device: torch.device | str = "cpu") -> Stats:
        """Zero sums for the fields in `needs`. Raises ElastiqError for a field that does not exist."""
        if needs - FIELDS:
            raise ElastiqError(f"statistics: unknown {sorted(needs - FIELDS)}; known: {', '.join(sorted(FIELDS))}")
        zeros = torch.zeros(in_features, device=device)
        stats = Stats()
        for name in needs - {"hessian", "grad_sq"}:
            setattr(stats, name, zeros.clone())
        if "hessian" in needs:
            stats.hessian = torch.zeros(in_features, in_features, device=device)
        if "grad_sq" in needs:
            stats.grad_sq = torch.zeros(0, in_features, device=device)
        return stats

    def update(self, x: Tensor, weights: Tensor | None = None, gradient: Tensor | None = None) -> None:
        """Add the rows of `x` [..., in], each weighing 1 or as `weights` [...] says (not negative).

        gradient [..., out]: what came back to the rows' outputs, for `grad_sq`.

        Rows that are not finite, or whose weight is not, are dropped and counted.
        """
        x = x.detach().reshape(-1, x.shape[-1]).float()
        weights = torch.ones(len(x), device=x.device) if weights is None else weights.detach().reshape(-1).float()
        gradient = None if gradient is None else gradient.detach().reshape(len(x), -1).float()
        if not bool(torch.isfinite(x.sum() + weights.sum())):  # or the sum alone is too large
            finite = torch.isfinite(x).all(dim=1) & torch.isfinite(weights)
            self.dropped += int((~finite).sum())
            x, weights = x[finite], weights[finite]
            gradient = None if gradient is None else gradient[finite]
        if not len(x):
            return
        self.count += len(x)
        self.total += float(weights.sum(dtype=torch.float64))
        if self.hessian is not None:
            _add_products(self.hessian, x * weights.sqrt().unsqueeze(1))
        if self.diagonal is not None:
            self.diagonal += (x.square() * weights.unsqueeze(1)).sum(dim=0)
        if self.abs_max is not None:
            torch.maximum(self.abs_max, x.abs().amax(dim=0), out=self.abs_max)
        if self.mean is not None:
            self.mean += weights @ x
        if self.abs_mean is not None:
            self.abs_mean += weights @ x.abs()
        if self.grad_sq is not None and gradient is not None:
            moved = gradient.square().T @ x.square()
            self.grad_sq = self.grad_sq + moved if self.grad_sq.numel() else moved

    def merge(self, other: Stats) -> Stats:
        """Statistics of both: sums and counts add, the larger maximum is taken. New object."""
        sums = {name: _both(torch.add, getattr(self, name), getattr(other, name)) for name in FIELDS - {"abs_max"}}
        return Stats(
            count=self.count + other.count,
            total=self.total + other.total,
            dropped=self.dropped + other.dropped,
            abs_max=_both(torch.maximum, self.abs_max, other.abs_max),
            **sums,
        )

    def mean_hessian(self) -> Tensor:
        """[in, in] weighted mean of x xᵀ; raises ElastiqError if it was not collected or nothing was seen."""
        if self.hessian is None or not self.total:
            raise ElastiqError("statistics: no Hessian was collected; calibrate with at least one window of text")
        return self.hessian / self.total

    def mean_diagonal(self, in_features: int) -> Tensor:
        """[in] weighted mean of x², all ones where nothing is known (a matrix that no token reached)."""
        if self.total and self.diagonal is not None:
            return self.diagonal / self.total
        if self.total and self.hessian is not None:
            return self.hessian.diagonal() / self.total
        return torch.ones(in_features)


def _add_products(total: Tensor, x: Tensor) -> None:
    """total [in, in], symmetric, += xᵀ x for x [rows, in]: only what is on and above the diagonal is computed."""
    for first in range(0, len(total), PANEL):
        last = first + PANEL
        total[first:last, first:].addmm_(x[:, first:last].T, x[:, first:])
        total[last:, first:last] = total[first:last, last:].T


def _both(join, a: Tensor | None, b: Tensor | None) -> Tensor | None:  # type: ignore[no-untyped-def]
    if a is None or b is None:
        return None
    return join(a, b) if a.shape == b.shape else max(a, b, key=Tensor.numel)
