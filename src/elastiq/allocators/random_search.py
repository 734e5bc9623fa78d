"""The baseline that says what chance is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core import Allocator, Choices, Problem, Solution


@dataclass(frozen=True)
class RandomSearch(Allocator, name="random"):
    """Raises items at random, a level at a time, until nothing fits; of `trials` such maps the least predicted loss."""

    trials: int = 1
    seed: int = 0

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        generator = np.random.default_rng(self.seed)
        maps = [_random_map(problem, generator) for _ in range(max(1, self.trials))]
        return Solution(min(maps, key=problem.total_loss))


def _random_map(problem: Problem, generator: np.random.Generator) -> Choices:
    choices = [0] * problem.items
    spent = problem.total_costs(tuple(choices))
    open_items = list(range(problem.items))
    while open_items:
        index = int(generator.integers(len(open_items)))
        item = open_items[index]
        level = choices[item]
        if level + 1 < len(problem.levels):
            raised = spent + problem.costs[:, item, level + 1] - problem.costs[:, item, level]
            if problem.holds(raised):
                choices[item], spent = level + 1, raised
                continue
        open_items[index] = open_items[-1]
        open_items.pop()
    return tuple(choices)
