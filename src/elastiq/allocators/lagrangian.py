"""The map on the frontier that is nearest below the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core import Allocator, Choices, Problem, Solution
from ..linalg import climb


@dataclass(frozen=True)
class Lagrangian(Allocator, name="lagrangian"):
    """Minimises loss + lambda * cost for every item on its own, with the smallest lambda that the limits allow
    (Shoham and Gersho 1988), then takes further steps of the frontier that fit.

    Every budget gives a point of one sequence of steps, the any-time order. Of several limits each counts as a part
    of the room it leaves.
    """

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        return Solution(tuple(climb(problem.loss, problem.costs, problem.limits).tolist()))
