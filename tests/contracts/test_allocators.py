"""What every registered allocator must do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastiq.allocators as allocators
from elastiq.allocate.allocation import solve
from elastiq.core import Allocator, Choices, Problem, Step, step_from_dict

CASES: list[Allocator] = [
    allocators.IntegerProgramme(),
    allocators.Lagrangian(),
    allocators.MarginalGain(),
    allocators.EqualLoss(),
    allocators.RandomSearch(trials=3),
    allocators.Evolutionary(generations=3, offspring=4),
]
LEVELS = (2, 3, 4, 6)


def random_problem(items: int, limits: int, seed: int, tightness: float) -> Problem:
    """Losses that fall about as 4^-level, costs that are whole numbers (bits) or not (seconds)."""
    generator = np.random.default_rng(seed)
    weights = generator.integers(1, 9, items).astype(float)
    noise = np.exp(generator.normal(0, 0.4, (items, len(LEVELS))))
    loss = np.exp(generator.normal(0, 2, (items, 1))) * noise * 4.0 ** -np.array(LEVELS, dtype=float)
    loss = np.maximum.accumulate(loss[:, ::-1], axis=1)[:, ::-1]
    costs = [weights[:, None] * np.array(LEVELS, dtype=float)]
    for _ in range(limits - 1):
        costs.append(np.cumsum(generator.random((items, len(LEVELS))), axis=1))
    stacked = np.stack(costs)
    least, most = stacked[:, :, 0].sum(axis=1), stacked[:, :, -1].sum(axis=1)
    return Problem(LEVELS, weights, loss, stacked, np.floor(least + tightness * (most - least) + 1))


def brute_force(problem: Problem) -> float:
    maps = itertools.product(range(len(problem.levels)), repeat=problem.items)
    return min(problem.total_loss(choices) for choices in maps if problem.fits(choices))


problems = st.builds(
    random_problem,
    items=st.integers(1, 5),
    limits=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    tightness=st.floats(0, 1),
)


def test_every_registered_allocator_has_a_case() -> None:
    assert set(Step.registry["allocator"]) == {type(case).name for case in CASES}


@pytest.mark.parametrize("allocator", CASES, ids=lambda case: case.name)
@settings(max_examples=60, deadline=None)
@given(problem=problems)
def test_contract(allocator: Allocator, problem: Problem) -> None:
    """Within every limit, deterministic, its bound holds; exact ones equal brute force, all are above it."""
    solution = allocator.allocate(problem)
    assert problem.fits(solution.choices)
    assert solution == allocator.allocate(problem)
    least = brute_force(problem)
    assert solution.bound <= least * (1 + 1e-9)
    loss = problem.total_loss(solution.choices)
    assert loss >= least * (1 - 1e-12)
    if allocator.exact:
        assert loss <= least * (1 + 2e-5)


@pytest.mark.parametrize("allocator", CASES, ids=lambda case: case.name)
@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_solved_maps_use_the_budget_and_are_not_worse_than_uniform(allocator: Allocator, problem: Problem) -> None:
    solution, _ = solve(problem, allocator)
    assert problem.fits(solution.choices)
    for item, choice in enumerate(solution.choices):
        raised = (*solution.choices[:item], choice + 1, *solution.choices[item + 1 :])
        assert choice + 1 == len(LEVELS) or not problem.fits(raised), "one more step would fit"
    uniform = [(index,) * problem.items for index in range(len(LEVELS))]
    best = min(problem.total_loss(choices) for choices in uniform if problem.fits(choices))
    assert problem.total_loss(solution.choices) <= best


@pytest.mark.parametrize("allocator", CASES, ids=lambda case: case.name)
def test_extreme_budgets(allocator: Allocator) -> None:
    problem = random_problem(6, 1, 3, 1.0)
    assert solve(problem, allocator)[0].choices == (len(LEVELS) - 1,) * 6
    problem.limits[0] = problem.costs[0, :, 0].sum()
    assert solve(problem, allocator)[0].choices == (0,) * 6


@pytest.mark.parametrize("allocator", CASES, ids=lambda case: case.name)
def test_flat_losses_and_equal_costs(allocator: Allocator) -> None:
    """A matrix that never loses anything, one that gains nothing, and steps that cost nothing."""
    problem = random_problem(5, 2, 7, 0.4)
    problem.loss[0] = 0.0
    problem.loss[1] = 0.3
    problem.costs[1, 2] = 1.5
    assert problem.fits(solve(problem, allocator)[0].choices)


@pytest.mark.parametrize("allocator", CASES, ids=lambda case: case.name)
def test_round_trip_as_data(allocator: Allocator) -> None:
    assert step_from_dict("allocator", allocator.to_dict()) == allocator


def test_evolution_finds_what_predictions_hide() -> None:
    """The measured damage disagrees with the losses about one item; the search on damage finds that out."""
    problem = random_problem(4, 1, 5, 0.4)
    hidden = problem.loss.copy()
    hidden[[0, 1]] = hidden[[1, 0]] * 50

    def damage(choices: Choices) -> float:
        return float(hidden[np.arange(4), list(choices)].sum())

    step = allocators.Evolutionary(generations=30, offspring=8)
    blind = step.allocate(problem).choices
    assert damage(step.allocate(problem, damage).choices) < damage(blind)
    assert damage(solve(problem, step, damage)[0].choices) <= damage(blind)


def test_thousands_of_items_with_a_proved_gap() -> None:
    problem = random_problem(4000, 1, 11, 0.3)
    solution = allocators.IntegerProgramme().allocate(problem)
    assert problem.fits(solution.choices)
    assert problem.total_loss(solution.choices) <= solution.bound * (1 + 1e-4)
