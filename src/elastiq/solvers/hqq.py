"""Half-quadratic quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import MIN_SCALE, Codes, ElastiqError, Format, Grid, Solver, Stats, Term, to_half
from ..linalg import streams
from ..parts.fitting import grouped

_FARTHEST = 30_000.0
"""Cells between a group's weights and zero, at most."""


@dataclass(frozen=True)
class HQQ(Solver, name="hqq"):
    """Zero points for which the weights' errors are sparse, found without data.

    HQQ (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; no preprint), equations
    3 to 5: the scale of a group is that of its range; the zero point minimises the sum of |error|^p by turns of a
    generalized soft threshold, whose strength `beta` grows by `kappa` a round, and of a mean. What differs: the authors
    stop for a whole matrix once its mean error grows, here every group keeps its best of all rounds; zero points stay
    fractional at 4 bits too; levels below the top one read its top bits, on scales refitted by least squares with all
    inputs alike.

    p: exponent of the error, above 0 and at most 1. rounds: at most.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    minimises: ClassVar[str] = "the weights' errors to the power p"

    def __post_init__(self) -> None:
        self.require_at_least(rounds=1, kappa=1)
        if not 0 < self.p <= 1 or not self.beta > 0:
            raise ElastiqError(f"hqq: p={self.p} must be above 0 and at most 1, beta={self.beta} above 0")

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        fitted = format.fit(weight, stats)
        if not isinstance(fitted, Grid):
            raise ElastiqError(f"hqq: it solves for integer codes, not those of {format.name}")
        present = grouped(torch.ones_like(weight[:1]), fitted.group_size) > 0
        groups = grouped(weight, fitted.group_size)
        scale, zero_point = self._fit(groups, present, fitted.bits, fitted.symmetric)
        grid = Grid(fitted.levels[-1:], fitted.group_size, scale[None], zero_point[None], fitted.symmetric)
        codes = grid.quantize(weight)
        alike = torch.eye(weight.shape[1], device=weight.device)
        return (Codes(codes, streams.refit_lower_levels(weight, alike, codes, grid, format.levels)),)

    def _fit(self, groups: Tensor, present: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point [out, groups] of weights [out, groups, columns], without those that are not `present`
        [1, groups, columns]."""
        top = 2.0**bits - 1
        low = groups.masked_fill(~present, torch.inf).amin(-1)
        high = groups.masked_fill(~present, -torch.inf).amax(-1)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        # A range far from zero, and narrow, must leave the zero point a number that half precision has.
        scale = to_half(torch.maximum((high - low) / top, torch.maximum(-low, high) / _FARTHEST)).clamp_min(MIN_SCALE)
        zero_point = torch.full_like(scale, top / 2) if symmetric else to_half(-low / scale)
        best, best_zero = torch.full_like(scale, torch.inf), zero_point
        beta = self.beta
        for _ in range(self.rounds + 1):
            unit, zero = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
            codes = (groups / unit + zero).round().clamp(0, top)
            error = groups - unit * (codes - zero)
            loss = (error.abs() ** self.p * present).sum(-1)
            better = loss < best
            best, best_zero = torch.where(better, loss, best), torch.where(better, zero_point, best_zero)
            if symmetric:  # the zero point is the middle, and there is nothing to fit
                break
            # Equation 4: what of the error is left to the outliers; equation 5: the mean of the rest.
            size = error.abs()
            sparse = error.sign() * (size - size.clamp_min(1e-12) ** (self.p - 1) / beta).clamp_min(0)
            moved = (codes - (groups - sparse) / unit) * present
            zero_point = to_half(moved.sum(-1) / present.sum(-1))
            beta *= self.kappa
        return scale, best_zero
