"""The one way from a budget to a level map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import allocators as _registered  # noqa: F401  (its import fills the registry)
from ..checkpoint import CheckpointReader
from ..core import Allocator, Choices, Damage, ElastiqError, LevelMap, Problem, Solution, Width, step_from_dict
from ..linalg import lagrangian_bound
from .budget import Budget, check_reachable, spoken
from .losses import DEFAULT_ALLOCATOR, Measurement, cuts, losses, read_stored
from .prediction import Prediction
from .table import Floats, Table


@dataclass(frozen=True)
class Allocation:
    """A level map and what is known about it.

    sizes: mean_bits, bits_per_weight, bytes_in_memory. loss: predicted, in the sensitivity's unit; kl: the same as KL
    divergence where uniform maps were measured. gap: how far the loss may be from the least possible, relative.
    uniform: the widest uniform level within the budget, with its loss, None where none fits. notes: what a user should
    know, sentences.
    """

    level_map: LevelMap
    sizes: Mapping[str, Any]
    sensitivity: str
    allocator: str
    loss: float
    kl: float | None
    gap: float
    uniform: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.level_map.facts, "widths": dict(self.level_map.widths)}


def allocate(
    path: str | Path | CheckpointReader,
    budget: Budget,
    *,
    max_kl: float | None = None,
    sensitivity: str | None = None,
    allocator: str | Allocator | None = None,
    untie: bool = False,
    rows: bool = False,
    table: Table | None = None,
    measure: Callable[[Mapping[str, Width]], Damage] | None = None,
) -> Allocation:
    """The best level map of a checkpoint within `budget`; no weight is read.

    max_kl: take the smallest map whose predicted KL divergence is at most this, within the budget. sensitivity: name of
    a stored measurement, None for the best there is. allocator: a step or its name. untie: matrices that engines fuse
    may differ, and experts of one tensor. rows: so may the rows of a matrix, in parts that a measurement made; the map
    is still a width for each matrix where that is predicted to be as good. table: costs other than the checkpoint's
    own. measure: damage of widths, for allocators that search on the whole model.

    The map never exceeds the budget, no further step fits into it, and its loss is at most that of the best uniform
    map within the budget. Raises ElastiqError for a budget below the smallest map, naming that.
    """
    reader = path if isinstance(path, CheckpointReader) else CheckpointReader(path)
    if rows and budget.latency is not None:
        raise ElastiqError("budget: whole matrices are timed, not their rows; give --latency without --rows")
    stored = read_stored(reader)
    table = table or Table.of(reader, untie or rows, cuts=cuts(reader, stored, untie, rows))
    measurement, loss = losses(reader, table, stored, sensitivity)
    prediction = Prediction.of(table, loss, measurement, stored)
    step = _step(allocator)
    if max_kl is not None:
        return _within_damage(reader, table, loss, budget, measurement, prediction, step, max_kl)
    if not budget.given:
        raise ElastiqError("budget: give a limit, such as bits=3.5")
    problem = _problem(table, loss, budget, budget.limits(table))
    damage = None if measure is None else lambda choices: measure(table.widths(choices)).kl
    solution, notes = solve(problem, step, damage)
    found = _allocation(reader, table, problem, budget, measurement, prediction, step, solution, notes)
    if rows:
        whole = allocate(reader, budget, sensitivity=measurement.name, allocator=step, measure=measure)
        return whole if whole.loss <= found.loss else found
    return found


def solve(
    problem: Problem, step: Allocator, damage: Callable[[Choices], float] | None = None
) -> tuple[Solution, tuple[str, ...]]:
    """The step's solution with what is left of the budget used up, or the best uniform map's where that loses less."""
    uniform = [(index,) * problem.items for index in range(len(problem.levels))]
    uniform = [choices for choices in uniform if problem.fits(choices)]
    problem = replace(problem, starts=tuple(uniform))
    solution = step.allocate(problem, damage)
    score = damage if damage is not None and step.measures else problem.total_loss
    notes = []
    best = uniform[-1]
    if score(best) < score(solution.choices):
        solution = Solution(best, solution.bound)
        notes.append(
            f"the uniform map at {problem.levels[best[0]]} bits loses less than what {step.name} found, and is taken"
        )
    filled = fill(problem, solution.choices)
    return Solution(filled, solution.bound), tuple(notes)


def fill(problem: Problem, choices: Choices) -> Choices:
    """`choices` with every further step that fits, those that gain most per cost first."""
    done = list(choices)
    while True:
        left = problem.limits - problem.total_costs(tuple(done))
        rows = np.arange(problem.items)
        gain = problem.loss[rows, done][:, None] - problem.loss
        price = problem.costs - problem.costs[:, rows, done][:, :, None]
        wider = np.arange(len(problem.levels))[None, :] > np.array(done)[:, None]
        fits = wider & (price <= left[:, None, None]).all(axis=0)
        if not fits.any():
            return tuple(done)
        value = np.where(fits, gain / np.maximum(price[0], np.finfo(float).tiny), -np.inf)
        item, level = np.unravel_index(int(np.argmax(value)), value.shape)
        done[int(item)] = int(level)


def _step(allocator: str | Allocator | None) -> Allocator:
    if isinstance(allocator, Allocator):
        return allocator
    return cast(Allocator, step_from_dict("allocator", {"name": allocator or DEFAULT_ALLOCATOR}))


def _problem(table: Table, loss: Floats, budget: Budget, limits: Mapping[str, float]) -> Problem:
    if "latency" in limits and "latency" not in table.costs:
        raise ElastiqError("budget: a latency needs measured times; elastiq allocate --latency measures them")
    check_reachable(budget, table, table.costs)
    costs = np.stack([table.costs[unit] for unit in limits])
    return Problem(table.levels, table.group_weights, loss, costs, np.array(list(limits.values())))


def _within_damage(
    reader: CheckpointReader,
    table: Table,
    loss: Floats,
    budget: Budget,
    measurement: Measurement,
    prediction: Prediction,
    step: Allocator,
    max_kl: float,
) -> Allocation:
    """The smallest map, by halving the size it may have, whose predicted KL divergence is within the bound."""
    bound = prediction.loss_at(max_kl)
    sizes = table.costs["bits_per_weight"]
    low, high = float(sizes[:, 0].sum()), float(sizes[:, -1].sum())
    limits = {"bits_per_weight": high} | budget.limits(table)
    problem = _problem(table, loss, budget, limits)
    place = list(limits).index("bits_per_weight")
    best, notes = solve(problem, step)
    if problem.total_loss(best.choices) > bound:
        least = prediction.kl(problem.total_loss(best.choices))
        within = " within the budget" if budget.given else ""
        raise ElastiqError(f"max damage: kl={max_kl:g} cannot be had{within}; the least predicted is {least:.3g}")
    unit = float(np.gcd.reduce(sizes.astype(np.int64).ravel()))
    first, last = 0, round((problem.total_costs(best.choices)[place] - low) / unit)
    while first < last:
        middle = (first + last) // 2
        smaller = problem.limits.copy()
        smaller[place] = low + middle * unit
        tried, tried_notes = solve(replace(problem, limits=smaller), step)
        if problem.total_loss(tried.choices) <= bound:
            best, notes = tried, tried_notes
            last = round((problem.total_costs(tried.choices)[place] - low) / unit)
        else:
            first = middle + 1
    problem.limits[place] = problem.total_costs(best.choices)[place]
    notes = (*notes, f"the smallest map whose predicted KL divergence is at most {max_kl:g}")
    return _allocation(reader, table, problem, budget, measurement, prediction, step, best, notes)


def _allocation(
    reader: CheckpointReader,
    table: Table,
    problem: Problem,
    budget: Budget,
    measurement: Measurement,
    prediction: Prediction,
    step: Allocator,
    solution: Solution,
    notes: tuple[str, ...],
) -> Allocation:
    choices, widths = solution.choices, table.widths(solution.choices)
    loss = problem.total_loss(choices)
    bounds = [lagrangian_bound(problem.loss, c, float(x)) for c, x in zip(problem.costs, problem.limits, strict=True)]
    bound = max([solution.bound, *bounds])
    fitting = [index for index in range(len(table.levels)) if problem.fits((index,) * problem.items)]
    uniform = None
    if fitting:
        flat = problem.total_loss((fitting[-1],) * problem.items)
        uniform = {"bits": table.levels[fitting[-1]], "loss": flat, "kl": prediction.kl(flat)}
    if all(choice == len(table.levels) - 1 for choice in choices):
        notes = (*notes, "the budget exceeds the widest map there is")
    sizes = table.sizes(reader, choices)
    gap = max(0.0, (loss - bound) / loss) if loss > 0 else 0.0
    facts = {
        "checkpoint": reader.path.resolve().name,
        "budget": {unit: spoken(unit, value) for unit, value in budget.given.items()},
        **sizes,
        "sensitivity": dict(measurement.method),
        "allocator": step.to_dict(),
        "loss": loss,
        "kl": prediction.kl(loss),
        "gap": gap,
        "uniform": uniform,
        "notes": list(notes),
    }
    return Allocation(
        level_map=LevelMap(widths, facts),
        sizes=sizes,
        sensitivity=measurement.name,
        allocator=step.name,
        loss=loss,
        kl=prediction.kl(loss),
        gap=gap,
        uniform=uniform,
        notes=notes,
    )
