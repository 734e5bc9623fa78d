"""Search on the damage of whole maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core import Allocator, Choices, Problem, Solution
from ..linalg import climb


@dataclass(frozen=True)
class Evolutionary(Allocator, name="evolutionary"):
    """A (1 + offspring) evolution over maps within the budget (EvoPress, 2410.14649), on the model's
    measured damage, or on predicted losses where none can be measured.

    A child differs from its parent in a few level switches: some items a level up, others down until it fits. It
    starts from the best of the given maps and of the frontier's; the paper starts from random ones and ranks children
    on growing samples of text, here every child is measured on the same.
    """

    measures = True

    generations: int = 40
    offspring: int = 8
    switches: int = 3
    seed: int = 0

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        generator = np.random.default_rng(self.seed)
        known: dict[Choices, float] = {}

        def fitness(choices: Choices) -> float:
            if choices not in known:
                known[choices] = (damage or problem.total_loss)(choices)
            return known[choices]

        frontier = tuple(climb(problem.loss, problem.costs, problem.limits).tolist())
        parent = min({frontier, *(start for start in problem.starts if problem.fits(start))}, key=fitness)
        for _ in range(self.generations):
            children = [self._child(problem, parent, generator) for _ in range(self.offspring)]
            parent = min([parent, *children], key=fitness)
        return Solution(parent)

    def _child(self, problem: Problem, parent: Choices, generator: np.random.Generator) -> Choices:
        """A map within the limits near `parent`; the parent itself where a try does not lead to one."""
        choices, top = list(parent), len(problem.levels) - 1
        for _ in range(int(generator.integers(1, self.switches + 1))):
            raisable = [item for item, choice in enumerate(choices) if choice < top]
            if raisable:
                choices[raisable[int(generator.integers(len(raisable)))]] += 1
        for _ in range(problem.items):
            child = tuple(choices)
            if problem.fits(child):
                return child
            lowerable = [item for item in range(problem.items) if 0 < choices[item] <= parent[item]]
            if not lowerable:
                break
            choices[lowerable[int(generator.integers(len(lowerable)))]] -= 1
        return parent
