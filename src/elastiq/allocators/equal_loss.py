"""Every weight loses the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core import Allocator, Choices, Problem, Solution

_STEPS = 60
"""Halvings of the interval that holds the common loss."""


@dataclass(frozen=True)
class EqualLoss(Allocator, name="equal-loss"):
    """The closed form of BAQ (2506.05664): where a loss falls as c 4^-b, the best widths give every weight one loss,
    b_i = log4(c_i / (n_i nu)) with n_i weights.

    c_i is fitted to the logarithms of the losses at hand. Widths are rounded to the nearest level, with the smallest
    nu for which the rounded ones fit; BAQ rounds down and hands what is left to the largest fractions.
    """

    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        levels = np.array(problem.levels, dtype=np.float64)
        smallest = np.finfo(float).tiny
        log_c = np.log(np.maximum(problem.loss, smallest)) / np.log(4.0) + levels
        log_c = np.where(problem.loss > 0, log_c, np.nan)
        known = np.isfinite(log_c).any(axis=1)
        ideal = np.full(problem.items, -np.inf)  # what never loses anything needs no bits
        ideal[known] = np.nanmean(log_c[known], axis=1) - np.log(problem.weights[known]) / np.log(4.0)

        def choices(log_nu: float) -> Choices:
            widths = np.clip(ideal - log_nu, levels[0], levels[-1])
            return tuple(np.abs(widths[:, None] - levels[None, :]).argmin(axis=1).tolist())

        finite = ideal[known]
        low, high = (float(finite.min() - levels[-1]), float(finite.max())) if len(finite) else (0.0, 0.0)
        if problem.fits(choices(low)):
            return Solution(choices(low))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if problem.fits(choices(middle)) else (middle, high)
        best = choices(high)
        return Solution(best if problem.fits(best) else (0,) * problem.items)
