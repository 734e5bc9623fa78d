"""The nested solver: one code per weight for every level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Codes, ElastiqError, Format, Solver, Stats, Term
from ..linalg import cholesky, streams
from ..linalg.columns import Nest


@dataclass(frozen=True)
class Nested(Solver, name="nested"):
    """One error stream, scale and zero point per level; the levels share only the choice of the code.

    A column's code is the one that minimises sum_r weight_r (w_r - value_r(code))², w_r being what level r still has
    to represent after its own errors in earlier columns; its lower bits are cut off for lower levels. Afterwards
    coordinate descent lowers sum_r weight_r ||(W - Q_r) X||², codes and scales in turn.

    Close to MatGPTQ (2602.03537), which feeds one averaged error forward and has one shared min-max scale.

    weights: of each level in the objective, one per level of the format; empty: 2^(r // 2).
    damp, refits, passes, block_size: as in GPTQ. beam: prefixes kept from one level to the next; 5 finds the codes
        that scoring all of them finds.
    """

    weights: tuple[float, ...] = ()
    damp: float = 0.01
    refits: int = 2
    passes: int = 3
    beam: int = 5
    block_size: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        hessian = stats.mean_hessian().to(weight.device)
        damped, upper, _ = cholesky.factor_with_retry(hessian, self.damp, "nested")
        nest = Nest(format.levels, self.level_weights(format.levels), self.beam)
        search = streams.Search(self.refits, self.passes, self.block_size)
        return (Codes(*streams.solve(weight, damped, upper, nest, format.fit(weight, stats), search)),)

    def level_weights(self, levels: tuple[int, ...]) -> tuple[float, ...]:
        """The weights in force; raises ElastiqError if there is not one per level."""
        if not self.weights:
            return tuple(2.0 ** (level // 2) for level in levels)
        if len(self.weights) != len(levels):
            raise ElastiqError(f"nested: {len(self.weights)} weights for {len(levels)} levels; give one per level")
        return self.weights
