"""decoupleQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import MIN_SCALE, Codes, ElastiqError, Format, Grid, Solver, Stats, Term, to_half
from ..linalg import cholesky, streams
from ..linalg.on_grid import solve_on_grid


@dataclass(frozen=True)
class DecoupleQ(Solver, name="decoupleq"):
    """Integer part and floating part in turn (decoupleQ, 2404.12759, section 3.3, equations 7 and 8).

    Each of `rounds`: with scales and zero points fixed, the codes by GPTQ (the paper's first level of approximation);
    with the codes fixed, all scales and zero points of a row together by least squares in the Hessian's metric (its
    equation 8, in closed form), in half precision. The best round of each row is kept. The paper's last stage, which
    trains norms and the floating parts of a block, is a tuner's work.
    """

    rounds: int = 4
    damp: float = 0.01
    block_size: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "diagonal"})

    def __post_init__(self) -> None:
        self.require_at_least(rounds=1, damp=0, block_size=1)

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        damped, upper, _ = cholesky.factor_with_retry(stats.mean_hessian().to(weight.device), self.damp, "decoupleq")
        grid = format.fit(weight, stats)
        if not isinstance(grid, Grid):
            raise ElastiqError(f"decoupleq: it solves for integer codes, not those of {format.name}")
        top = Grid(grid.levels[-1:], grid.group_size, grid.scale[-1:], grid.zero_point[-1:], grid.symmetric)
        best, codes = torch.full((len(weight),), torch.inf, device=weight.device), torch.zeros_like(weight).byte()
        scale, zero = top.scale.clone(), top.zero_point.clone()
        for _ in range(self.rounds):
            trial = solve_on_grid(weight, upper, top, None, self.block_size)
            for fitted in (top, least_squares(weight, damped, trial, top)):
                error = weight - fitted.dequantize(trial, fitted.bits)
                loss = ((error @ damped) * error).sum(1)
                better = loss < best
                best, codes[better] = torch.where(better, loss, best), trial[better]
                scale[:, better], zero[:, better] = fitted.scale[:, better], fitted.zero_point[:, better]
                top = fitted
        found = Grid(top.levels, top.group_size, scale, zero, top.symmetric)
        return (Codes(codes, streams.refit_lower_levels(weight, damped, codes, found, format.levels)),)


def least_squares(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """Scales and zero points of every row that fit `codes` best: per row the basis of each group's codes and ones."""
    size, width, groups = grid.group_size, weight.shape[1], grid.scale.shape[2]
    middle = (2.0**grid.bits - 1) / 2
    member = torch.nn.functional.one_hot(torch.arange(width, device=weight.device) // size, groups).float()
    scale, zero = grid.scale.clone(), grid.zero_point.clone()
    for first in range(0, len(weight), 16):
        rows = slice(first, first + 16)
        unit = (codes[rows].float() - middle)[..., None] * member  # [rows, in, groups]
        basis = unit if grid.symmetric else torch.cat([unit, member.expand_as(unit)], -1)
        moved = hessian @ basis
        gram = (basis.mT @ moved).double()
        gram.diagonal(dim1=1, dim2=2).add_(1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-30)
        solved = torch.linalg.solve(gram, (moved.mT @ weight[rows, :, None]).double())[..., 0].float()
        new = to_half(solved[:, :groups])
        sane = torch.isfinite(new) & (new >= MIN_SCALE)
        scale[0, rows] = torch.where(sane, new, scale[0, rows])
        if not grid.symmetric:
            point = to_half(middle - solved[:, groups:] / scale[0, rows])
            zero[0, rows] = torch.where(sane & torch.isfinite(point), point, zero[0, rows])
    return Grid(grid.levels, size, scale, zero, grid.symmetric)
