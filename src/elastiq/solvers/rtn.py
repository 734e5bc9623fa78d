"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Codes, Format, Grid, Solver, Stats, Term
from ..linalg import streams


@dataclass(frozen=True)
class RoundToNearest(Solver, name="rtn"):
    """Every weight takes the nearest code of the top level, on scales found by the format's clip search.

    Lower levels read the top bits of the same codes, each with scales of its own, refitted by least squares weighted
    with the Hessian's diagonal; on a format that is not affine they read what the format says.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        grid = format.fit(weight, stats)
        codes = grid.quantize(weight)
        if not isinstance(grid, Grid):
            return (grid.term(codes),)
        diagonal = stats.mean_diagonal(weight.shape[1]).to(weight.device)
        return (Codes(codes, streams.refit_lower_levels(weight, torch.diag(diagonal), codes, grid, format.levels)),)
