"""How a nested matrix is cut into arrays: one bit plane per width, scales per level."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..core import Width, width_counts

ROLES = ("linear", "conv1d", "expert", "embedding", "head")

ArraySpec = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a stored array."""


def plane_array(plane: int) -> str:
    """Short name of the array of one bit plane, counted from 1: plane 1 stands under the matrix's own name."""
    return "weight" if plane == 1 else f"plane_{plane}"


@dataclass(frozen=True)
class StoredMatrix:
    """One nested matrix, or all expert matrices of one fused tensor.

    name: of the array in the checkpoint (`Site.tensor`).
    shape: (out_features, in_features); with a leading number of experts for the role `expert`.
    group_size: input channels per scale; the last group of a row may be shorter.
    levels: widths with scales of their own, ascending.
    symmetric: zero points are the middle of the range and not stored.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    group_size: int
    levels: tuple[int, ...]
    symmetric: bool = False

    @property
    def out_features(self) -> int:
        return self.shape[-2]

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    def arrays(self, plane: int) -> dict[str, ArraySpec]:
        """Arrays that travel with `plane` (from 1), by short name; the lowest level's scales travel with plane 1."""
        packed = (*self.shape[:-1], -(-self.in_features // 8))
        specs: dict[str, ArraySpec] = {plane_array(plane): (torch.uint8, packed)}
        level = self.levels[0] if plane == 1 else plane
        if level in self.levels and (plane == 1 or level != self.levels[0]):
            specs |= dict.fromkeys(self.scale_arrays(level), (torch.float16, self._scale_shape()))
        return specs

    def scale_arrays(self, level: int) -> tuple[str, ...]:
        """Short names of the scales and zero points of a level that has its own."""
        return (f"scale_{level}",) if self.symmetric else (f"scale_{level}", f"zero_point_{level}")

    @property
    def members(self) -> int:
        """How many parts may have a width of their own: experts of a fused tensor, rows of a linear layer, else one."""
        return 1 if self.role == "embedding" else self.shape[0]

    def some(self, count: int) -> StoredMatrix:
        """As many of the members, as a matrix."""
        return replace(self, shape=(count, *self.shape[1:]))

    def num_bits(self, bits: Width) -> int:
        """Stored bits that a reader of `bits` (at most the top level) needs: planes, scales and zero points; a byte for
        each member where it says its width."""
        if isinstance(bits, str):
            counts = width_counts(bits, self.members)
            return 8 * len(bits) + sum(self.some(count).num_bits(width) for width, count in counts.items())
        plane = math.prod(self.arrays(1)["weight"][1]) * 8
        scales = len(self.scale_arrays(self.levels[0])) * math.prod(self._scale_shape()) * 16
        return bits * plane + scales

    def scale_level(self, bits: int) -> int:
        """The level whose scales a reader of `bits` uses: the nearest lower one, or the lowest."""
        return max((level for level in self.levels if level <= bits), default=self.levels[0])

    def _scale_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], -(-self.in_features // self.group_size))


def readable_widths(levels: tuple[int, ...], planes: int) -> tuple[int, ...]:
    """Widths that the first `planes` bit planes give: every width up to their number, or the one of a single level."""
    if len(levels) == 1:
        return levels if planes >= levels[0] else ()
    return tuple(range(1, planes + 1))
