"""A checkpoint read at certain widths, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ..checkpoint.reader import CheckpointReader
from ..core import ElastiqError, RowPowers, Width, derive
from ..inference.loading import has_own_head
from ..linalg import unpack_planes
from ..parts import TableCodes
from ..runtime.nested import NestedMatrix
from ..runtime.stored import StoredMatrix, plane_array


@dataclass(frozen=True)
class GridCodes:
    """A matrix as it is read: value = scale * (code - zero_point).

    codes: uint8 [..., out, in]. scale, zero_point: float32 [..., out, groups]. bits: of the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    bits: int

    def dense(self) -> Tensor:
        """Values float32 [..., out, in]."""
        scale, zero_point = self.per_column()
        return (self.codes.float() - zero_point) * scale

    def per_column(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight."""
        group = torch.arange(self.codes.shape[-1]) // self.group_size
        return self.scale[..., group], self.zero_point[..., group]


class View:
    """The matrices of a checkpoint at the widths of a level map, and what is not quantized.

    bits: one width, or {matrix name: width} with the rest at the widest.
    Raises ElastiqError for a matrix or a width that the checkpoint does not have.
    """

    def __init__(self, reader: CheckpointReader, bits: int | Mapping[str, Width] | None) -> None:
        self.reader = reader
        names = reader.manifest.matrices
        widths = dict.fromkeys(names, bits if isinstance(bits, int) else reader.available[-1])
        for name, width in (bits if isinstance(bits, Mapping) else {}).items():
            if isinstance(width, str):
                raise ElastiqError(
                    f"{name}: its rows or experts have widths of their own, which no other format takes; export a map "
                    "with a width for each matrix (elastiq allocate without --rows or --untie)"
                )
            if name not in names:
                raise reader.unknown(name)
            widths[name] = width
        for width in set(widths.values()):
            reader.require(width)
        self.widths = widths

    @property
    def matrices(self) -> dict[str, StoredMatrix]:
        return self.reader.manifest.matrices

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json without the quantization; it ties no embeddings where the head is stored apart from them."""
        config = {key: value for key, value in self.reader.config.items() if key != "quantization_config"}
        return config | {"tie_word_embeddings": False} if has_own_head(self.reader) else config

    def codes(self, name: str, bits: int | None = None) -> GridCodes:
        """One matrix at its width, or at `bits`; powers of two of its rows are multiplied into the scales. Raises
        ElastiqError unless it is nested integer codes and no more."""
        if not self.matrices[name].coded or self.matrices[name].inner_parts:
            kinds = ", ".join(sorted({part.kind for part in self.matrices[name].inner_parts}))
            raise ElastiqError(f"{name}: consists of more than integer codes ({kinds}); export to hf")
        stored, bits = self.matrices[name], bits or self.widths[name]
        arrays = self.reader.read(name, bits)
        codes = unpack_planes([arrays[plane_array(plane)] for plane in range(1, bits + 1)], stored.in_features)
        own = stored.scale_level(bits)
        read = stored.decode_scales(own, arrays)
        scale = read[f"scale_{own}"].float()
        middle = (2**own - 1) / 2
        zero = torch.full_like(scale, middle) if stored.symmetric else read[f"zero_point_{own}"].float()
        if own != bits:
            scale, zero = derive(scale, zero, own, bits)
        for part in stored.parts:
            at = slice(None) if part.expert is None else part.expert
            scale[at] *= cast(RowPowers, part.restore(arrays)).factor[:, None]
        return GridCodes(codes.contiguous(), scale, zero, stored.group_size, bits)

    def dense(self, name: str) -> Tensor:
        """Values float32 [..., out, in] of one matrix at its width, whatever it consists of."""
        if self.matrices[name].coded and not self.matrices[name].inner_parts:
            return self.codes(name).dense()
        module = NestedMatrix(self.matrices[name], torch.float32)
        for plane in range(1, self.widths[name] + 1):
            for _, arrays in self.reader.plane(plane, [name]):
                module.hold(arrays)
        module.bits = self.widths[name]
        return module.dense()

    def table(self, name: str) -> TableCodes:
        """The codes of a matrix that consists of nothing but codes on a table, its rows' powers of two multiplied into
        the scales. Raises ElastiqError for any other, and where the scales cannot hold them."""
        stored = self.matrices[name]
        if not stored.coded and len(stored.inner_parts) == 1:
            found = stored.restore(self.reader.read(name, self.widths[name]))
            term = next((part for part in found if isinstance(part, TableCodes)), None)
            powers = next((part for part in found if isinstance(part, RowPowers)), None)
            if term is not None and powers is None:
                return term
            if term is not None and powers is not None:
                grid = term.grid.times(powers.factor)
                if grid is None:
                    raise ElastiqError(f"{name}: {term.grid.store} scales cannot hold its rows' sizes; export to hf")
                return replace(term, grid=grid)
        raise ElastiqError(f"{name}: consists of more than codes on a table; export to hf")

    def source_bits(self, name: str) -> int:
        """Width to fit a format without zero points to: below four bits a level's own codes fit it so badly that the
        widest level is the better start."""
        width = self.widths[name]
        return width if width >= 4 or self.matrices[name].symmetric else self.reader.available[-1]

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is not quantized."""
        return self.reader.base()
