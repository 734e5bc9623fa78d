"""What every group of matrices costs at every level, from the checkpoint's description alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import CheckpointReader
from ..checkpoint.sizes import base_bytes, held_bytes, map_sizes
from ..core import ElastiqError
from ..models import fused_groups
from ..runtime import StoredMatrix

Floats = NDArray[np.float64]
Times = Mapping[tuple[tuple[int, ...], int], float]
"""Seconds for one token by shape of a matrix and level."""


@dataclass(frozen=True)
class Table:
    """Groups of matrices that share a level, and their costs.

    groups: names of matrices. levels: candidates, ascending: those with scales, and so with losses, of their own; the
    derived widths between them cost more than the level below and were never fitted. weights: of all groups together.
    group_weights: [groups]. costs: by unit of a budget, [groups, levels] in bits, bytes or seconds. base_bytes,
    base_seconds: what does not depend on the map.
    """

    groups: tuple[tuple[str, ...], ...]
    levels: tuple[int, ...]
    group_weights: Floats
    costs: Mapping[str, Floats]
    base_bytes: int
    base_seconds: float = 0.0

    @property
    def weights(self) -> int:
        return int(self.group_weights.sum())

    @staticmethod
    def of(
        reader: CheckpointReader,
        untie: bool = False,
        base: int | None = None,
        times: Times | None = None,
        base_seconds: float = 0.0,
    ) -> Table:
        """The table of a checkpoint. untie: a group for every matrix. base: bytes of everything that is not quantized,
        None for the precision it is stored in. times, base_seconds: measured, for budgets of latency."""
        matrices = reader.manifest.matrices
        groups = [(name,) for name in matrices] if untie else fused_groups(matrices)
        members = [[matrices[name] for name in group] for group in groups]
        costs = {
            "bits": _costs(members, reader.levels, lambda m, level: m.num_weights * level),
            "bits_per_weight": _costs(members, reader.levels, lambda m, level: m.num_bits(level)),
            "size": _costs(members, reader.levels, held_bytes),
        }
        if times is not None:
            seconds = _costs(members, reader.levels, lambda m, level: times[m.shape, level])
            costs["latency"] = np.maximum.accumulate(seconds, axis=1)  # clocks are not exact
        return Table(
            groups=tuple(groups),
            levels=reader.levels,
            group_weights=np.array([sum(m.num_weights for m in group) for group in members], dtype=np.float64),
            costs=costs,
            base_bytes=base_bytes(reader) if base is None else base,
            base_seconds=base_seconds,
        )

    def widths(self, choices: tuple[int, ...]) -> dict[str, int]:
        """Matrix -> level of choices, one per group."""
        return {
            name: self.levels[choice] for group, choice in zip(self.groups, choices, strict=True) for name in group
        }

    def sizes(self, reader: CheckpointReader, choices: tuple[int, ...]) -> dict[str, Any]:
        """`map_sizes` of choices, with this table's base bytes, and seconds_per_token where times were measured."""
        total = {unit: float(cost[np.arange(len(choices)), list(choices)].sum()) for unit, cost in self.costs.items()}
        sizes = map_sizes(reader, self.widths(choices)) | {"bytes_in_memory": int(self.base_bytes + total["size"])}
        return sizes | ({"seconds_per_token": total["latency"] + self.base_seconds} if "latency" in total else {})

    def choices(self, widths: Mapping[str, int]) -> tuple[int, ...]:
        """The choices that make `widths`. Raises ElastiqError where a group's matrices differ, or for no level."""
        result = []
        for group in self.groups:
            levels = {widths[name] for name in group}
            if len(levels) > 1 or not levels <= set(self.levels):
                raise ElastiqError(f"level map: {', '.join(group)} are at {sorted(levels)}; use --untie")
            result.append(self.levels.index(levels.pop()))
        return tuple(result)


def _costs(members: list[list[StoredMatrix]], levels: tuple[int, ...], cost) -> Floats:  # type: ignore[no-untyped-def]
    return np.array([[sum(cost(m, level) for m in group) for level in levels] for group in members], dtype=np.float64)
