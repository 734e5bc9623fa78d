"""The whole curve of quality against bits, and the order in which to go along it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import CheckpointReader
from ..checkpoint.sizes import map_sizes
from ..core import Width
from ..linalg import hull_steps
from .losses import cuts, losses, read_stored
from .prediction import Prediction
from .table import Table


@dataclass(frozen=True)
class Step:
    """Raise `matrices` (a group), or of the one matrix the rows or experts `members`, from one level to another;
    afterwards the whole model takes `bits_per_weight`, `mean_bits` and `bytes_in_memory` and loses `loss` (as KL
    divergence `kl`, None where nothing was measured)."""

    matrices: tuple[str, ...]
    members: tuple[int, ...] | None
    start: int
    stop: int
    mean_bits: float
    bits_per_weight: float
    bytes_in_memory: int
    loss: float
    kl: float | None


@dataclass(frozen=True)
class Frontier:
    """The any-time order. lowest: the smallest map's widths, a digit for each row or expert that steps tell apart.
    steps: in order, each from the best known map for what is in memory to the next. uniform: level -> sizes, loss and
    kl of the uniform maps."""

    sensitivity: str
    lowest: Mapping[str, Width]
    sizes: Mapping[str, Any]
    steps: tuple[Step, ...]
    uniform: Mapping[int, Mapping[str, Any]]

    def widths(self, count: int) -> dict[str, Width]:
        """The map after the first `count` steps."""
        widths = dict(self.lowest)
        digits = {name: list(width) for name, width in widths.items() if isinstance(width, str)}
        for step in self.steps[:count]:
            if step.members is None:
                widths |= dict.fromkeys(step.matrices, step.stop)
            else:
                for member in step.members:
                    digits[step.matrices[0]][member] = str(step.stop)
        return widths | {name: int(d[0]) if len(set(d)) == 1 else "".join(d) for name, d in digits.items()}


def frontier(
    path: str | Path | CheckpointReader, *, sensitivity: str | None = None, untie: bool = False, rows: bool = False
) -> Frontier:
    """Every map on the lower convex hull of loss against counted bits, from the smallest to the widest. Any of them has
    the least predicted loss for its size. untie, rows: as for `allocate`."""
    reader = path if isinstance(path, CheckpointReader) else CheckpointReader(path)
    stored = read_stored(reader)
    table = Table.of(reader, untie or rows, cuts=cuts(reader, stored, untie, rows))
    measurement, loss = losses(reader, table, stored, sensitivity)
    prediction = Prediction.of(table, loss, measurement, stored)
    items, starts, stops, _ = hull_steps(loss, table.costs["bits_per_weight"])
    totals = {unit: float(cost[:, 0].sum()) for unit, cost in table.costs.items()}
    total = float(loss[:, 0].sum())
    steps = []
    for item, start, stop in zip(items.tolist(), starts.tolist(), stops.tolist(), strict=True):
        for unit, cost in table.costs.items():
            totals[unit] += float(cost[item, stop] - cost[item, start])
        total = max(0.0, total - float(loss[item, start] - loss[item, stop]))
        members = table.members[item]
        steps.append(
            Step(
                matrices=table.groups[item],
                members=None if members is None else tuple(members.tolist()),
                start=table.levels[start],
                stop=table.levels[stop],
                mean_bits=totals["bits"] / table.weights,
                bits_per_weight=totals["bits_per_weight"] / table.weights,
                bytes_in_memory=int(totals["size"]) + table.base_bytes,
                loss=total,
                kl=prediction.kl(total),
            )
        )
    smallest = table.widths((0,) * len(table.groups))
    cut = {group[0] for group, members in zip(table.groups, table.members, strict=True) if members is not None}
    digit = str(table.levels[0])
    lowest = smallest | {name: digit * reader.manifest.matrices[name].members for name in cut}
    uniform = {}
    for index, level in enumerate(table.levels):
        flat = float(np.sum(loss[:, index]))
        measured = stored.uniform.get(level)
        uniform[level] = {
            **map_sizes(reader, dict.fromkeys(reader.manifest.matrices, level)),
            "loss": flat,
            "kl": prediction.kl(flat) if measured is None else measured.kl,
        }
    return Frontier(measurement.name, lowest, map_sizes(reader, smallest), tuple(steps), uniform)
