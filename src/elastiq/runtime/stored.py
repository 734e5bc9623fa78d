"""How a nested matrix is cut into arrays: one bit plane per width, scales per level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core import (
    FUSED,
    TRANSPOSED,
    ArraySpec,
    ElastiqError,
    Part,
    RowPowers,
    Width,
    decode_level,
    is_read,
    level_specs,
    library_errors,
    width_counts,
)


def plane_array(plane: int) -> str:
    """Short name of the array of one bit plane, counted from 1: plane 1 stands under the matrix's own name."""
    return "weight" if plane == 1 else f"plane_{plane}"


@dataclass(frozen=True)
class StoredArray:
    """An array of a part; plane and levels as in `core.Kept`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    plane: int
    levels: tuple[int, ...]


@dataclass(frozen=True)
class StoredPart:
    """A fold or a side term of a matrix, or of one expert.

    prefix: before the short names of its arrays in the checkpoint; empty for what stands in the place of codes.
    arrays: by short name. facts: what its class gave to be restored with.
    """

    kind: str
    prefix: str
    arrays: Mapping[str, StoredArray]
    facts: Mapping[str, Any]
    expert: int | None = None

    def restore(self, found: Mapping[str, torch.Tensor]) -> Part:
        """The part from the matrix's arrays that are there; what belongs to planes not there is left out."""
        arrays = {name: found[self.prefix + name] for name in self.arrays if self.prefix + name in found}
        with library_errors(f"{self.kind}: the stored arrays do not make one", "copy the checkpoint again"):
            return Part.registry[self.kind].restore(arrays, self.facts)


@dataclass(frozen=True)
class StoredMatrix:
    """One nested matrix, or all expert matrices of one fused tensor.

    name: of the array in the checkpoint (`Site.tensor`).
    shape: (out_features, in_features); with a leading number of experts where it is fused.
    group_size: input channels per scale; the last group of a row may be shorter.
    levels: widths with scales of their own, ascending.
    symmetric: zero points are the middle of the range and not stored.
    scales: how scales and zero points are stored (`core.storage`).
    coded: it has nested integer codes; otherwise it consists of `parts` alone.
    parts: folds and side terms, those of one expert in their order.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    group_size: int
    levels: tuple[int, ...]
    symmetric: bool = False
    coded: bool = True
    parts: tuple[StoredPart, ...] = field(default=())
    scales: str = "half"

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def fused(self) -> bool:
        """Whether it is all experts of one tensor."""
        return self.role in FUSED

    @property
    def transposed(self) -> bool:
        """Whether the model it stands in stores [in, out]."""
        return self.role in TRANSPOSED

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def inner_parts(self) -> tuple[StoredPart, ...]:
        """The parts without the powers of its rows: what makes the matrix more than its codes."""
        return tuple(part for part in self.parts if part.kind != RowPowers.kind)

    def arrays(self, plane: int) -> dict[str, ArraySpec]:
        """Arrays that travel with `plane` (from 1), by short name; the lowest level's scales travel with plane 1."""
        specs = self._coded_arrays(plane, self.scale_arrays)
        return specs | {name: (a.dtype, a.shape) for name, a in self._part_arrays() if a.plane == plane}

    def tiled_arrays(self, plane: int) -> dict[str, ArraySpec]:
        """What a model holds in tile order once it has the nested codes of `plane`, by short name."""
        half: ArraySpec = (torch.float16, self._scale_shape())
        return self._coded_arrays(plane, lambda level: dict.fromkeys(self.scale_names(level), half))

    def level_of(self, plane: int) -> int | None:
        """The level whose scales travel with `plane`."""
        level = self.levels[0] if plane == 1 else plane
        return level if level in self.levels and (plane == 1 or level != self.levels[0]) else None

    def scale_arrays(self, level: int) -> dict[str, ArraySpec]:
        """Arrays of the scales and zero points of a level that has its own, by short name."""
        return level_specs(self.scales, level, self._scale_shape(), self.symmetric)

    def scale_names(self, level: int) -> tuple[str, ...]:
        """What products call them."""
        return (f"scale_{level}",) if self.symmetric else (f"scale_{level}", f"zero_point_{level}")

    def decode_scales(self, level: int, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """float16 scale and zero point [..., out, groups] of a level that has its own, by those names. Raises
        ElastiqError where they are not finite."""
        groups = self._scale_shape()[-1]
        found = decode_level(self.scales, level, arrays, groups, self.symmetric)
        named = {name: array for name, array in zip(self.scale_names(level), found, strict=False) if array is not None}
        for name, array in named.items():
            self.check(name, array)
        return named

    def check(self, name: str, array: torch.Tensor) -> None:
        """Raise ElastiqError if an array called `name` of the matrix holds what is no number."""
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise ElastiqError(f"{self.name}: its {name} holds NaN or infinite numbers; copy the checkpoint again")

    def restore(self, arrays: Mapping[str, torch.Tensor], expert: int | None = None) -> list[Part]:
        """The parts of the matrix, or of one expert. Raises ElastiqError where arrays do not make them."""
        try:
            return [part.restore(arrays) for part in self.parts if part.expert == expert]
        except ElastiqError as error:
            raise ElastiqError(f"{self.name}: {error}") from error

    def read_names(self, bits: int) -> list[str]:
        """Short names of the arrays that a reader of `bits` needs."""
        names = [name for name, a in self._part_arrays() if is_read(a.plane, a.levels, bits)]
        if not self.coded:
            return names
        return [*map(plane_array, range(1, bits + 1)), *self.scale_arrays(self.scale_level(bits)), *names]

    @property
    def members(self) -> int:
        """How many parts may have a width of their own: experts of a fused tensor, rows of a linear layer, else one.
        A matrix with folds or side terms is read at one width."""
        return 1 if self.role == "embedding" or self.parts else self.shape[0]

    def some(self, count: int) -> StoredMatrix:
        """As many of the members, as a matrix."""
        return replace(self, shape=(count, *self.shape[1:]))

    def num_bits(self, bits: Width) -> int:
        """Stored bits that a reader of `bits` (at most the top level) needs: planes, scales, zero points and parts; a
        byte for each member where it says its width."""
        if isinstance(bits, str):
            counts = width_counts(bits, self.members)
            return 8 * len(bits) + sum(self.some(count).num_bits(width) for width, count in counts.items())
        parts = sum(
            8 * math.prod(a.shape) * a.dtype.itemsize
            for _, a in self._part_arrays()
            if is_read(a.plane, a.levels, bits)
        )
        if not self.coded:
            return parts
        plane = 8 * math.prod(self.arrays(1)["weight"][1])
        scales = self.scale_arrays(self.levels[0]).values()
        return bits * plane + parts + sum(8 * math.prod(shape) * dtype.itemsize for dtype, shape in scales)

    def scale_level(self, bits: int) -> int:
        """The level whose scales a reader of `bits` uses: the nearest lower one, or the lowest."""
        return max((level for level in self.levels if level <= bits), default=self.levels[0])

    def _coded_arrays(self, plane: int, scales: Callable[[int], dict[str, ArraySpec]]) -> dict[str, ArraySpec]:
        """The nested codes of `plane` and what `scales` gives for the level that comes with it."""
        if not self.coded:
            return {}
        packed, level = (*self.shape[:-1], -(-self.in_features // 8)), self.level_of(plane)
        return {plane_array(plane): (torch.uint8, packed)} | ({} if level is None else scales(level))

    def _part_arrays(self) -> Iterator[tuple[str, StoredArray]]:
        return ((part.prefix + name, array) for part in self.parts for name, array in part.arrays.items())

    def _scale_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], -(-self.in_features // self.group_size))


def readable_widths(levels: tuple[int, ...], planes: int, coded: bool = True) -> tuple[int, ...]:
    """Widths that the first `planes` bit planes give: every width up to their number, or the one of a single level.

    coded: scales of integers serve lower widths than their own; a table does not.
    """
    if len(levels) == 1:
        return levels if planes >= levels[0] else ()
    return tuple(range(1 if coded else levels[0], planes + 1))
