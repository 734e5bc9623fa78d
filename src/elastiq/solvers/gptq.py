"""GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Codes, Format, Grid, Solver, Stats, Term
from ..linalg import cholesky, streams
from ..linalg.columns import Nest
from ..linalg.on_grid import solve_on_grid


@dataclass(frozen=True)
class GPTQ(Solver, name="gptq"):
    """Column after column, the error of each handed to the columns after it (GPTQ, 2210.17323, algorithm 1).

    damp: fraction of the mean Hessian diagonal added to it, raised tenfold until the Cholesky factor exists.
    act_order: visit channels by falling Hessian diagonal, on scales fitted beforehand.
    refits, passes: rounds of scale refit per group, and sweeps of coordinate descent over codes and scales afterwards;
        both 0 is the published algorithm, on other scales: fractional zero points, and ranges that the format clips
        where the paper takes the extremes. `damp` is .01 there, and every token weighs the same (`Recipe`).
    block_size: columns per lazy update (section 3.3, step 2); changes nothing but speed.

    On a format that is not affine it is the published algorithm, on scales fitted beforehand.
    With several levels the codes are those of the top level; lower levels refit their scales on its top bits.
    """

    damp: float = 0.003
    act_order: bool = False
    refits: int = 2
    passes: int = 4
    block_size: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        self.require_at_least(damp=0, refits=0, passes=0, block_size=1)

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        hessian = stats.mean_hessian().to(weight.device)
        order = None
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
            hessian = hessian[order][:, order]
        damped, upper, _ = cholesky.factor_with_retry(hessian, self.damp, "gptq")
        grid = format.fit(weight, stats)
        if not isinstance(grid, Grid):
            return (grid.term(solve_on_grid(weight, upper, grid, order, self.block_size)),)
        del hessian  # it is as large as all else here
        nest = Nest(format.levels[-1:], (1.0,))
        search = streams.Search(self.refits, self.passes, 0, self.block_size)
        codes, grid = streams.solve(weight, damped, upper, nest, grid, search, order)
        if order is not None:
            inverse = order.argsort()
            damped = damped[inverse][:, inverse]
        return (Codes(codes, streams.refit_lower_levels(weight, damped, codes, grid, format.levels)),)
