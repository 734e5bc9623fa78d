"""Small floats as compressed-tensors holds them: FP8, and the blocks of MX and NV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec, ElastiqError
from ..parts import TableCodes, bits_of, values
from ..runtime.stored import StoredMatrix
from .bit_stream import pack_stream, unpack_stream

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class FloatKind:
    """One of its formats.

    number: of `terms.values`, whose codes are the same bits. group_size: weights under a scale, None where any number
    or the whole row may be. stores: ways of storing scales that it holds without change.
    """

    format: str
    number: str
    group_size: int | None
    stores: tuple[str, ...]

    @property
    def bits(self) -> int:
        return bits_of(self.number)

    def arrays(self, stored: StoredMatrix) -> dict[str, ArraySpec]:
        """Arrays of one matrix by short name."""
        rows, columns = stored.shape
        groups = columns // stored.group_size
        codes: dict[str, ArraySpec] = {"weight": (_FP8, (rows, columns))}
        if self.bits < 8:
            codes = {"weight_packed": (torch.uint8, (rows, columns * self.bits // 8))}
        scale = {"e8m0": torch.uint8, "e4m3": _FP8}.get(self.stores[0], torch.float32)
        shared: dict[str, ArraySpec] = {"weight_global_scale": (torch.float32, (1,))} if self.global_scale else {}
        return codes | {"weight_scale": (scale, (rows, groups))} | shared

    @property
    def global_scale(self) -> bool:
        """Whether the scales of a matrix lie under one more."""
        return "e4m3" in self.stores

    def pack(self, term: TableCodes, stored: StoredMatrix, top: Tensor | None = None) -> dict[str, Tensor]:
        """Their content. top: what the matrix's own global scale is replaced by; its scales are rounded anew."""
        codes, scale = term.codes, dict(term.grid.scales[self.bits])
        if top is not None:
            small = (scale[""].view(_FP8).float() * (scale["_top"] / top)).clamp(max=448)
            scale = {"": small.to(_FP8).view(torch.uint8), "_top": top}
        packed = codes.view(_FP8) if self.bits == 8 else pack_stream(codes, self.bits).view(torch.uint8)
        arrays = {"weight" if self.bits == 8 else "weight_packed": packed}
        if self.global_scale:  # by which the reader divides
            arrays |= {"weight_scale": scale[""].view(_FP8), "weight_global_scale": 1 / scale["_top"]}
        else:
            arrays["weight_scale"] = scale[""] if "e8m0" in self.stores else scale[""].float()
        specs = self.arrays(stored)
        return {short: array.reshape(specs[short][1]) for short, array in arrays.items()}

    def unpack(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Values float32 [out, in] that the arrays say."""
        scale = arrays["weight_scale"]
        scale = torch.exp2(scale.double() - 127).float() if "e8m0" in self.stores else scale.float()
        if "weight_global_scale" in arrays:
            scale = scale / arrays["weight_global_scale"]
        if self.bits == 8:
            numbers = arrays["weight"].float()
        else:
            packed = arrays["weight_packed"]
            columns = packed.shape[1] * 8 // self.bits
            numbers = values(self.number)[unpack_stream(packed.view(torch.int32), self.bits, columns).int()]
        return numbers * scale.repeat_interleave(numbers.shape[1] // scale.shape[1], 1)

    def weights(self, stored: StoredMatrix) -> dict[str, Any]:
        """What config.json says about the weights."""
        row = stored.group_size == stored.in_features and self.group_size is None
        strategy = "channel" if row else "tensor_group" if self.global_scale else "group"
        said = {
            "num_bits": self.bits,
            "type": "float",
            "symmetric": True,
            "strategy": strategy,
            "group_size": None if row else stored.group_size,
            "dynamic": False,
        }
        dtype = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}.get(self.stores[0])
        return said if dtype is None else said | {"scale_dtype": dtype}


KINDS = (
    FloatKind("nvfp4-pack-quantized", "e2m1", 16, ("e4m3",)),
    FloatKind("mxfp4-pack-quantized", "e2m1", 32, ("e8m0",)),
    FloatKind("mxfp6-pack-quantized", "e2m3", 32, ("e8m0",)),
    FloatKind("mxfp8-quantized", "e4m3fn", 32, ("e8m0",)),
    FloatKind("float-quantized", "e4m3fn", None, ("half", "float")),
)


def float_kind(stored: StoredMatrix) -> FloatKind:
    """The format that holds a matrix of table codes without change. Raises ElastiqError, naming what it consists of and
    what could be held, if there is none."""
    kinds = ", ".join(sorted({part.kind for part in stored.inner_parts}))
    if len(stored.inner_parts) == 1 and kinds == TableCodes.kind:
        table = stored.inner_parts[0]
        facts = table.facts
        number, store, size = facts["names"][-1] or "tables of its own", facts["store"], stored.group_size
        shifted = any(name.startswith("shift") for name in table.arrays)
        for kind in KINDS:
            if kind.number == number and store in kind.stores and kind.group_size in (None, size) and not shifted:
                return kind
        kinds = f"{number} under {store} scales per {size} weights"
    held = "; ".join(f"{kind.number} under {kind.stores[0]}, {kind.group_size or 'any'}" for kind in KINDS)
    raise ElastiqError(
        f"compressed-tensors: {stored.name} consists of {kinds}, which it cannot hold (floats that it holds, by scales "
        f"and weights per scale: {held}); export to hf"
    )
