"""Raise what gains most per bit, one level at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from ..core import Allocator, Choices, Problem, Solution
from ..linalg import prices


@dataclass(frozen=True)
class MarginalGain(Allocator, name="marginal-gain"):
    """From the lowest levels on, the next level goes to the item whose loss falls most per cost (the greedy allocation
    of MPTQ-ViT, 2401.14895, per matrix and with counted costs). It looks one level ahead; `Lagrangian`
    looks along the hull."""

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        price = prices(problem.costs, problem.limits)
        choices = [0] * problem.items
        spent = problem.total_costs(tuple(choices))
        heap: list[tuple[float, int]] = []

        def push(item: int) -> None:
            level = choices[item]
            if level + 1 < len(problem.levels):
                paid = max(float(price[item, level + 1] - price[item, level]), 1e-300)
                heapq.heappush(heap, (float(problem.loss[item, level + 1] - problem.loss[item, level]) / paid, item))

        for item in range(problem.items):
            push(item)
        while heap:
            _, item = heapq.heappop(heap)
            level = choices[item]
            raised = spent + problem.costs[:, item, level + 1] - problem.costs[:, item, level]
            if problem.holds(raised):
                choices[item], spent = level + 1, raised
                push(item)
        return Solution(tuple(choices))
