"""What every group of matrices costs at every level, from the checkpoint's description alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import CheckpointReader
from ..checkpoint.sizes import base_bytes, held_bytes, map_sizes
from ..core import ElastiqError, Width
from ..models import fused_groups
from ..runtime import StoredMatrix
from .cut import Cut

Floats = NDArray[np.float64]
Times = Mapping[tuple[tuple[int, ...], int], float]
"""Seconds for one token by shape of a matrix and level."""


@dataclass(frozen=True)
class Table:
    """Groups of matrices that share a level, and their costs.

    groups: names of matrices. members: for each group None, or the rows or experts of the one matrix that are meant.
    portions: [groups, levels] by which parts share the loss of their matrix. levels: candidates, ascending: those with
    scales, and so with losses, of their own; the derived widths between them cost more than the level below and were
    never fitted. weights: of all groups together. group_weights: [groups]. costs: by unit of a budget, [groups, levels]
    in bits, bytes or seconds. base_bytes, base_seconds: what does not depend on the map.
    """

    groups: tuple[tuple[str, ...], ...]
    members: tuple[NDArray[np.int64] | None, ...]
    portions: Floats
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
        cuts: Mapping[str, Cut] | None = None,
    ) -> Table:
        """The table of a checkpoint. untie: a group for every matrix. base: bytes of everything that is not quantized,
        None for float32, as a processor holds it. times, base_seconds: measured, for budgets of latency. cuts: matrices
        whose parts are groups of their own; each pays for saying where its rows or experts are."""
        matrices, cuts = reader.manifest.matrices, cuts or {}
        whole = [name for name in matrices if name not in cuts]
        groups = [(name,) for name in whole] if untie else fused_groups(whole)
        parts = [(name, index) for name, cut in cuts.items() for index in range(len(cut.members))]
        members = [np.array(cuts[name].members[index], dtype=np.int64) for name, index in parts]
        stored = [[matrices[name] for name in group] for group in groups]
        stored += [[matrices[name].some(len(part))] for (name, _), part in zip(parts, members, strict=True)]
        told = np.array([0] * len(groups) + [len(part) for part in members], dtype=np.float64)[:, None]
        costs = {
            "bits": _costs(stored, reader.levels, lambda m, level: m.num_weights * level),
            "bits_per_weight": _costs(stored, reader.levels, lambda m, level: m.num_bits(level)) + 8 * told,
            "size": _costs(stored, reader.levels, held_bytes) + 4 * told,
        }
        if times is not None:
            seconds = _costs(stored, reader.levels, lambda m, level: times[m.shape, level])
            costs["latency"] = np.maximum.accumulate(seconds, axis=1)  # clocks are not exact
        portions = [np.ones(len(reader.levels))] * len(groups) + [cuts[name].losses[index] for name, index in parts]
        return Table(
            groups=(*groups, *((name,) for name, _ in parts)),
            members=(*[None] * len(groups), *members),
            portions=np.array(portions),
            levels=reader.levels,
            group_weights=np.array([sum(m.num_weights for m in group) for group in stored], dtype=np.float64),
            costs=costs,
            base_bytes=base_bytes(reader) if base is None else base,
            base_seconds=base_seconds,
        )

    def shares(self, groups: list[int]) -> Floats:
        """[groups, levels] how several parts, or one group, share what was measured of them together; sums are 1. Where
        no part is known to lose anything, they share as at the level below, at the lowest by their size."""
        share = self.group_weights[groups]
        shares = []
        for portion in self.portions[groups].T:
            share = portion if portion.sum() > 0 else share
            shares.append(share / share.sum())
        return np.stack(shares, axis=1)

    def widths(self, choices: tuple[int, ...]) -> dict[str, Width]:
        """Matrix -> level of choices, one per group; a digit for each row or expert where they differ."""
        widths: dict[str, Width] = {}
        places: dict[str, list[tuple[NDArray[np.int64], int]]] = {}
        for group, members, choice in zip(self.groups, self.members, choices, strict=True):
            if members is None:
                widths |= dict.fromkeys(group, self.levels[choice])
            else:
                places.setdefault(group[0], []).append((members, self.levels[choice]))
        for name, parts in places.items():
            digits = np.empty(sum(len(members) for members, _ in parts), dtype=np.uint8)
            for members, level in parts:
                digits[members] = ord("0") + level
            same = len({level for _, level in parts}) == 1
            widths[name] = parts[0][1] if same else digits.tobytes().decode()
        return widths

    def sizes(self, reader: CheckpointReader, choices: tuple[int, ...]) -> dict[str, Any]:
        """`map_sizes` of choices, with this table's base bytes, and seconds_per_token where times were measured."""
        sizes = map_sizes(reader, self.widths(choices))
        sizes["bytes_in_memory"] += self.base_bytes - base_bytes(reader)
        if "latency" in self.costs:
            seconds = self.costs["latency"][np.arange(len(choices)), list(choices)].sum()
            sizes["seconds_per_token"] = float(seconds) + self.base_seconds
        return sizes

    def choices(self, widths: Mapping[str, Width]) -> tuple[int, ...]:
        """The choices that make `widths`, one for each matrix. Raises ElastiqError where a group's matrices differ, or
        for no level."""
        result = []
        for group in self.groups:
            levels = {widths[name] for name in group}
            if len(levels) > 1 or not levels <= set(self.levels):
                raise ElastiqError(f"level map: {', '.join(group)} are at {sorted(levels)}; use --untie")
            result.append(self.levels.index(levels.pop()))
        return tuple(result)


def _costs(members: list[list[StoredMatrix]], levels: tuple[int, ...], cost) -> Floats:  # type: ignore[no-untyped-def]
    return np.array([[sum(cost(m, level) for m in group) for level in levels] for group in members], dtype=np.float64)
