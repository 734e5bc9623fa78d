"""Convex hulls of loss against cost: the steps that no mixture of others beats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def hull_steps(loss: Floats, cost: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Floats]:
    """Steps along the lower convex hull of every item, by falling gain per cost.

    loss [items, levels] not increasing, cost [items, levels] not decreasing. Returns (item, from, to, slope), each
    [steps]; a step raises an item from one index of the hull to the next. Following them in order from the lowest
    choices, every map on the way has the least loss for its cost (Everett 1963): the Lagrangian sweep.
    """
    items, levels = loss.shape
    item, start, stop, slopes = [], [], [], []
    position = np.zeros(items, dtype=np.int64)
    rows = np.arange(items)
    while True:
        here_loss, here_cost = loss[rows, position][:, None], cost[rows, position][:, None]
        ahead = np.arange(levels)[None, :] > position[:, None]
        gain, price = here_loss - loss, cost - here_cost
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(ahead & (gain > 0), np.where(price > 0, gain / price, np.inf), -np.inf)
        best = slope.max(axis=1)
        # of equally steep steps the farthest, so that points on an edge are passed over
        target = levels - 1 - np.argmax(slope[:, ::-1] >= best[:, None], axis=1)
        moving = np.flatnonzero(np.isfinite(best) | (best == np.inf))
        if not len(moving):
            break
        item.append(moving)
        start.append(position[moving])
        stop.append(target[moving])
        slopes.append(best[moving])
        position = position.copy()
        position[moving] = target[moving]
    if not item:
        none = np.empty(0, dtype=np.int64)
        return none, none, none, np.empty(0)
    steps = [np.concatenate(part) for part in (item, start, stop, slopes)]
    order = np.argsort(-steps[3], kind="stable")
    return steps[0][order], steps[1][order], steps[2][order], steps[3][order]


def lagrangian_bound(loss: Floats, cost: Floats, limit: float) -> float:
    """A lower bound of the least total loss with total cost within `limit`: the value of the hull at the limit."""
    item, start, stop, slope = hull_steps(loss, cost)
    total, spent = float(loss[:, 0].sum()), float(cost[:, 0].sum())
    gains, prices = loss[item, start] - loss[item, stop], cost[item, stop] - cost[item, start]
    within = spent + np.cumsum(prices) <= limit
    count = int(len(within) if within.all() else np.argmin(within))
    total -= float(gains[:count].sum())
    if count < len(item):
        total -= float(slope[count]) * (limit - spent - float(prices[:count].sum()))
    return total


def prices(costs: Floats, limits: Floats) -> Floats:
    """[items, levels] one cost from several [limits, items, levels]: each as a part of what it may grow by."""
    room = np.maximum(limits - costs[:, :, 0].sum(axis=1), np.finfo(float).tiny)
    price: Floats = costs[0] if len(limits) == 1 else np.tensordot(1 / room, costs, axes=1)
    return price


def climb(loss: Floats, costs: Floats, limits: Floats) -> NDArray[np.int64]:
    """[items] choices: the hull's steps from the lowest choices on, in their order, each that still fits.

    costs [limits, items, levels], limits [limits]. An item that had to leave out a step takes no later one.
    """
    item, start, stop, _ = hull_steps(loss, prices(costs, limits))
    steps = costs[:, item, stop] - costs[:, item, start]
    spent = costs[:, :, 0].sum(axis=1)
    choices = np.zeros(len(loss), dtype=np.int64)
    within = (spent[:, None] + np.cumsum(steps, axis=1) <= limits[:, None]).all(axis=0)
    count = int(len(within) if within.all() else np.argmin(within))
    choices[item[:count]] = stop[:count]  # later steps of an item stand after its earlier ones
    spent = spent + steps[:, :count].sum(axis=1)
    for k in range(count, len(item)):
        if choices[item[k]] == start[k] and (spent + steps[:, k] <= limits).all():
            choices[item[k]] = stop[k]
            spent = spent + steps[:, k]
    return choices
