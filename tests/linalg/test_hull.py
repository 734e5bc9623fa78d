"""Hull steps against their definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from elastiq.linalg import climb, hull_steps, lagrangian_bound


def table(seed: int, items: int = 4, levels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    loss = -np.sort(-generator.random((items, levels)) ** 3, axis=1)
    cost = np.cumsum(generator.integers(1, 6, (items, levels)), axis=1).astype(float)
    return loss, cost


@pytest.mark.parametrize("seed", range(20))
def test_every_map_on_the_way_is_the_best_for_its_cost(seed: int) -> None:
    loss, cost = table(seed)
    item, start, stop, slope = hull_steps(loss, cost)
    assert (np.diff(slope) <= 0).all() and (stop > start).all()
    maps = np.array(list(itertools.product(range(5), repeat=4)))
    rows = np.arange(4)
    all_loss, all_cost = loss[rows, maps].sum(axis=1), cost[rows, maps].sum(axis=1)
    choices = np.zeros(4, dtype=int)
    for i, a, b in zip(item, start, stop, strict=True):
        assert choices[i] == a
        choices[i] = b
        spent = cost[rows, choices].sum()
        assert loss[rows, choices].sum() <= all_loss[all_cost <= spent].min() + 1e-12
        assert (climb(loss, cost[None], np.array([spent])) == choices).all()
    for limit in np.linspace(all_cost.min(), all_cost.max() + 3, 9):
        assert lagrangian_bound(loss, cost, limit) <= all_loss[all_cost <= limit].min() + 1e-12


def test_a_flat_loss_has_no_steps() -> None:
    loss, cost = table(0)
    loss[:] = 0.5
    assert len(hull_steps(loss, cost)[0]) == 0
    assert lagrangian_bound(loss, cost, 100.0) == 2.0
