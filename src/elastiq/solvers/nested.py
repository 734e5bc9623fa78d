"""The nested solver: one code per weight for every level."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor

from ..core import Codes, ElastiqError, Format, Grid, Solver, Stats, Term
from ..linalg import cholesky, streams
from ..linalg.columns import Nest

LEVEL_WEIGHTS = {1: 3.0, 2: 2.0, 3: 1.3, 4: 2.2, 5: 6.0, 6: 16.0, 7: 28.0, 8: 54.0}
"""Chosen on SmolLM2-135M so that every width stays near a file made for it alone (docs/nested-solver.md)."""


@dataclass(frozen=True)
class Nested(Solver, name="nested"):
    """One error stream, scale and zero point per level; the levels share only the choice of the code.

    A column's code is the one that minimises sum_r weight_r (w_r - value_r(code))², w_r being what level r still has
    to represent after its own errors in earlier columns; its lower bits are cut off for lower levels. Afterwards
    coordinate descent lowers sum_r weight_r ||(W - Q_r) X||², codes and scales in turn.

    Close to MatGPTQ (2602.03537), which feeds one averaged error forward and has one shared min-max scale.

    weights: of each level in the objective, one per level of the format; empty: `LEVEL_WEIGHTS`.
    damp, refits, passes, block_size: as in GPTQ.
    refines: sweeps at the end that move only the bits below 4, for the levels above them; the lower ones stay as they
        are, the higher ones gain what a few sweeps over all could not reach.
    beam: prefixes kept from one level to the next; 5 finds the codes that scoring all of them finds.
    """

    weights: tuple[float, ...] = ()
    damp: float = 0.003
    refits: int = 2
    passes: int = 4
    refines: int = 4
    beam: int = 5
    block_size: int = 128

    serves_top_alone: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        self.require_at_least(damp=0, refits=0, passes=0, refines=0, beam=1, block_size=1)

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        damped, upper, _ = cholesky.factor_with_retry(stats.mean_hessian().to(weight.device), self.damp, "nested")
        grid = format.fit(weight, stats)
        if not isinstance(grid, Grid):
            raise ElastiqError(f"nested: it chooses integer codes, not those of {format.name}; use rtn or gptq with it")
        nest = Nest(format.levels, self.level_weights(format.levels), self.beam)
        search = streams.Search(self.refits, self.passes, self.refines, self.block_size)
        return (Codes(*streams.solve(weight, damped, upper, nest, grid, search)),)

    def level_weights(self, levels: tuple[int, ...]) -> tuple[float, ...]:
        """The weights in force; raises ElastiqError if there is not one positive number per level."""
        if not self.weights:
            return tuple(LEVEL_WEIGHTS[level] for level in levels)
        if len(self.weights) != len(levels):
            raise ElastiqError(f"nested: {len(self.weights)} weights for {len(levels)} levels; give one per level")
        if not all(0 < weight < inf for weight in self.weights):
            raise ElastiqError(f"nested: weights={self.weights} must be positive numbers")
        return tuple(map(float, self.weights))
