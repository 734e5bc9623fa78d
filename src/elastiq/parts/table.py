"""Codes that stand for the entries of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..core import CodeGrid, ElastiqError, Kept, SideTerm, storage
from ..linalg import pack_planes, unpack_planes
from .values import values


@dataclass(frozen=True)
class TableGrid(CodeGrid):
    """value = scale * table[code] + shift, each level with a table, scales and shifts of its own.

    levels: ascending; the code of a level is the top bits of the code. group_size: input channels per scale. out,
    groups: how many rows and groups. names: of the tables in `values`, per level, "" where a table of its own is
    stored, `tables` [out, 2^level]. scales, shifts: level -> arrays that the storage called `store` made; a level that
    has none has scale 1 and shift 0.
    """

    levels: tuple[int, ...]
    group_size: int
    shape: tuple[int, int]
    names: tuple[str, ...]
    store: str = "half"
    tables: Mapping[int, Tensor] = field(default_factory=dict)
    scales: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    shifts: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def own(self, level: int) -> int:
        """The level whose numbers a reader of `level` takes: the nearest lower one. Raises ElastiqError below all."""
        if not self.levels[0] <= level <= self.bits:
            raise ElastiqError(f"level {level} is not between {self.levels[0]} and {self.bits}")
        return max(r for r in self.levels if r <= level)

    def table(self, level: int) -> Tensor:
        """[2^level] or [out, 2^level] of one of `levels`."""
        name = self.names[self.levels.index(level)]
        return values(name).to(self._device) if name else self.tables[level].float()

    def quantize(self, weight: Tensor, first: int = 0) -> Tensor:
        scale, shift = self._columns(self.bits, first, weight.shape[1])
        ordered, order = self._ordered
        unit = ((weight - shift) / scale).contiguous()
        above = torch.searchsorted(ordered, unit).clamp_(1, ordered.shape[-1] - 1)
        if ordered.dim() == 1:
            (low, high), (low_code, high_code) = ((x[above - 1], x[above]) for x in (ordered, order))
        else:
            (low, high), (low_code, high_code) = (
                (x.gather(1, above - 1), x.gather(1, above)) for x in (ordered, order)
            )
        middle = (low.double() + high.double()) / 2
        tied = (unit == middle) & (high_code % 2 == 0)  # to even, as floats round
        return torch.where((unit > middle) | tied, high_code, low_code).to(torch.uint8)

    def dequantize(self, codes: Tensor, level: int, first: int = 0) -> Tensor:
        return self.read(codes >> (self.bits - level), level, first)

    def read(self, codes: Tensor, level: int, first: int = 0) -> Tensor:
        """Values float32 of codes [out, columns] of `level` bits."""
        own = self.own(level)
        scale, shift = self._columns(own, first, codes.shape[1])
        table, codes = self.table(own), codes >> (level - own)
        found = table[codes.int()] if table.dim() == 1 else table.gather(1, codes.long())
        return found * scale + shift

    def term(self, codes: Tensor) -> TableCodes:
        return TableCodes(codes, self, self.bits)

    @cached_property
    def _ordered(self) -> tuple[Tensor, Tensor]:
        """The numbers of the top level in ascending order, and their codes; of equal ones the lower code is left."""
        table = self.table(self.bits)
        if table.dim() == 1:
            numbers, first = torch.unique(table, return_inverse=True)
            codes = torch.arange(len(table), device=table.device)
            return numbers, torch.full_like(first[: len(numbers)], len(table)).scatter_reduce(0, first, codes, "amin")
        ordered, order = table.sort(dim=1, stable=True)
        return ordered.contiguous(), order

    @property
    def _device(self) -> torch.device:
        arrays = [*self.tables.values(), *(array for named in self.scales.values() for array in named.values())]
        return arrays[0].device if arrays else torch.device("cpu")

    @cached_property
    def _decoded(self) -> dict[tuple[str, int], Tensor]:
        kind = storage(self.store)
        groups = -(-self.shape[1] // self.group_size)
        return {
            (what, level): kind.decode(arrays, (self.shape[0], groups))
            for what, found in (("scale", self.scales), ("shift", self.shifts))
            for level, arrays in found.items()
        }

    def times(self, factor: Tensor) -> TableGrid | None:
        """The grid of rows `factor` [out] times as large, half-precision scales as float32; None where scales of its
        storage do not hold that, or numbers stand beside them."""
        store = "float" if self.store == "half" else self.store
        found = {level: storage(store).encode(self._decoded["scale", level] * factor[:, None]) for level in self.scales}
        grid = replace(self, store=store, scales=found)
        same = all(
            torch.equal(grid._decoded["scale", level], self._decoded["scale", level] * factor[:, None])
            for level in self.scales
        )
        return grid if same and self.scales and not self.shifts else None

    def check(self) -> None:
        """Raise ValueError where a scale is none."""
        if not all(bool(torch.isfinite(array).all()) for array in self._decoded.values()):
            raise ValueError("a scale is not finite")

    def _columns(self, level: int, first: int, width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of every weight of these columns, or one number for all."""
        group = torch.arange(first, first + width, device=self._device) // self.group_size
        found = (self._decoded.get((what, level)) for what in ("scale", "shift"))
        neutral = (torch.ones(1, 1, device=self._device), torch.zeros(1, 1, device=self._device))
        scale, shift = (n if x is None else x[:, group] for x, n in zip(found, neutral, strict=True))
        return scale, shift


@dataclass(frozen=True)
class TableCodes(SideTerm, kind="table"):
    """Codes uint8 [out, in] on a table. held: their width, less than the grid's where planes are absent."""

    codes: Tensor
    grid: TableGrid
    held: int

    @property
    def levels(self) -> tuple[int, ...]:
        return self.grid.levels

    @property
    def group_size(self) -> int:
        return self.grid.group_size

    def dense(self, level: int) -> Tensor:
        return self.grid.read(self.codes >> (self.held - level), level)

    def kept(self) -> dict[str, Kept]:
        grid = self.grid
        planes = enumerate(pack_planes(self.codes, grid.bits), start=1)
        found = {"weight" if p == 1 else f"plane_{p}": Kept(plane, p) for p, plane in planes}
        for index, level in enumerate(grid.levels):
            plane = level if index else 1
            end = grid.levels[index + 1] if level < grid.bits else level + 1
            readers = tuple(range(level, end))
            for what, arrays in (("scale", grid.scales), ("shift", grid.shifts)):
                for suffix, array in arrays.get(level, {}).items():
                    found[f"{what}_{level}{suffix}"] = Kept(array, plane, readers)
            if level in grid.tables:
                found[f"table_{level}"] = Kept(grid.tables[level], plane, readers)
        return found

    def facts(self) -> dict[str, Any]:
        grid = self.grid
        return {
            "levels": list(grid.levels),
            "group_size": grid.group_size,
            "shape": list(grid.shape),
            "names": list(grid.names),
            "store": grid.store,
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        levels, (rows, width) = tuple(facts["levels"]), facts["shape"]
        held = sum(name == "weight" or name.startswith("plane_") for name in arrays)
        planes = [arrays["weight" if p == 1 else f"plane_{p}"] for p in range(1, held + 1)]
        codes = unpack_planes(planes, width)
        if codes.shape != (rows, width) or facts["group_size"] < 1:
            raise ValueError(f"codes are {list(codes.shape)}, not [{rows}, {width}]")
        found: dict[str, dict[int, dict[str, Tensor]]] = {"scale": {}, "shift": {}}
        for what, by_level in found.items():
            for level in levels:
                named = {n: a for n, a in arrays.items() if n == f"{what}_{level}" or n.startswith(f"{what}_{level}_")}
                if named:
                    by_level[level] = {name.removeprefix(f"{what}_{level}"): array for name, array in named.items()}
        tables = {level: arrays[f"table_{level}"] for level in levels if f"table_{level}" in arrays}
        size, names, store = facts["group_size"], tuple(facts["names"]), facts["store"]
        grid = TableGrid(levels, size, (rows, width), names, store, tables, found["scale"], found["shift"])
        grid.check()
        return cls(codes, grid, held)
