"""The best map there is, proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from ..core import Allocator, Choices, Problem, Solution
from ..linalg import climb, hull_steps, lagrangian_bound

_TRIES = 4
"""Solutions that exceed a limit by the solver's tolerance are solved for again with a smaller limit."""


@dataclass(frozen=True)
class IntegerProgramme(Allocator, name="integer-programme"):
    """A multiple-choice knapsack for the HiGHS solver of scipy; any number of limits (HAWQ-V3, 2011.10680;
    AdaQuant, 2006.10518; OHQ, 2309.01945; LQ-LoRA, 2311.12023).

    Before that, choices that cannot be in a map better than the frontier's are dropped by their reduced costs (Sinha
    and Zoltners 1979), so that of many thousand items a few hundred remain. gap: relative distance from the proved
    bound at which the solver may stop; seconds: when it must, with the best map so far.
    """

    exact = True

    gap: float = 1e-5
    seconds: float = 8.0

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        start: Choices = tuple(climb(problem.loss, problem.costs, problem.limits).tolist())
        best = problem.total_loss(start)
        bound, open_ = _reduced(problem, best)
        if best - bound <= self.gap * best:
            return Solution(start, bound)
        found, proved = self._solve(problem, open_, start)
        return Solution(found, max(bound, proved))

    def _solve(self, problem: Problem, open_: NDArray[np.bool_], start: Choices) -> tuple[Choices, float]:
        """The best choices among the open ones that fit, and the solver's bound."""
        item, level = np.nonzero(open_)
        loss = problem.loss[item, level]
        costs = problem.costs[:, item, level]
        scale = max(float(loss.max()), np.finfo(float).tiny)
        one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(problem.items, len(item)))
        excess = np.zeros(len(problem.limits))
        bound = 0.0
        for _ in range(_TRIES):
            units = np.maximum(np.abs(costs).max(axis=1), np.finfo(float).tiny)
            limits = LinearConstraint(costs / units[:, None], -np.inf, (problem.limits - excess) / units)
            result = milp(
                loss / scale,
                constraints=[LinearConstraint(one_each, 1, 1), limits],
                integrality=np.ones(len(item)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": self.gap, "time_limit": self.seconds},
            )
            if result.x is None:
                break
            bound = bound or float(result.mip_dual_bound or 0.0) * scale
            choices = np.asarray(start)
            taken = np.flatnonzero(result.x > 0.5)
            choices[item[taken]] = level[taken]
            found: Choices = tuple(choices.tolist())
            if problem.fits(found):
                return min(found, start, key=problem.total_loss), bound
            excess = excess + 2 * np.maximum(problem.total_costs(found) - problem.limits, 0.0)
        return start, bound


def _reduced(problem: Problem, best: float) -> tuple[float, NDArray[np.bool_]]:
    """A lower bound of the loss, and [items, levels] which choices a map better than `best` may hold.

    Each limit alone gives a bound, loss + multiplier * (cost - limit) minimised item by item; the largest is used.
    """
    bounds = []
    for cost, limit in zip(problem.costs, problem.limits, strict=True):
        bounds.append((lagrangian_bound(problem.loss, cost, float(limit)), _multiplier(problem, cost, float(limit))))
    index = max(range(len(bounds)), key=lambda k: bounds[k][0])
    bound, multiplier = bounds[index]
    value = problem.loss + multiplier * problem.costs[index]
    reduced = value - value.min(axis=1, keepdims=True)
    dual = float(value.min(axis=1).sum()) - multiplier * float(problem.limits[index])
    return bound, dual + reduced <= best + 1e-9 * abs(best)


def _multiplier(problem: Problem, cost: NDArray[np.float64], limit: float) -> float:
    """Slope of the hull where the limit falls on it; 0 where everything fits."""
    item, start, stop, slope = hull_steps(problem.loss, cost)
    spent = float(cost[:, 0].sum()) + np.cumsum(cost[item, stop] - cost[item, start])
    beyond = np.flatnonzero(spent > limit)
    return float(slope[beyond[0]]) if len(beyond) else 0.0
