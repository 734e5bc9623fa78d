"""Products with nested matrices, read from their bit planes in tile order.

`torch.ops.elastiq.matmul` is what modules call, so that compilers and exporters see one operation; compiled code runs
behind it where it can, else the readable twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, reference
from .tiles import tile_plane, tile_scale, untile_plane, untile_scale
from .weight import TiledWeight

__all__ = ["TiledWeight", "decode", "matmul", "tile_plane", "tile_scale", "untile_plane", "untile_scale"]

_library = torch.library.Library("elastiq", "DEF")
_library.define(
    "matmul(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero_point, Tensor? bias, int level, int out_features, "
    "int group_size, str activations) -> Tensor"
)
_library.define(
    "decode(Tensor[] planes, Tensor scale, Tensor? zero_point, Tensor? rows, int level, int out_features, "
    "int in_features, int group_size, ScalarType dtype) -> Tensor"
)


def _matmul(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    level: int,
    out_features: int,
    group_size: int,
    activations: str,
) -> Tensor:
    weight = TiledWeight(planes, scale, zero_point, level, out_features, x.shape[-1], group_size)
    if cpu.available(x.device, x.dtype):
        return cpu.matmul(x, weight, bias, activations)
    return reference.matmul(x, weight, bias)


def _decode(
    planes: list[Tensor],
    scale: Tensor,
    zero_point: Tensor | None,
    rows: Tensor | None,
    level: int,
    out_features: int,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = TiledWeight(planes, scale, zero_point, level, out_features, in_features, group_size)
    if cpu.available(scale.device, dtype):
        return cpu.decode(weight, rows, dtype)
    return reference.decode(weight, rows).to(dtype)


def _matmul_shape(x: Tensor, planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
                  level: int, out_features: int, group_size: int, activations: str) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _decode_shape(planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, rows: Tensor | None, level: int,
                  out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    count = out_features if rows is None else rows.shape[0]
    return scale.new_empty((count, in_features), dtype=dtype)


for name, body, shape in (("matmul", _matmul, _matmul_shape), ("decode", _decode, _decode_shape)):
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"elastiq::{name}", shape, lib=_library)

matmul = torch.ops.elastiq.matmul.default
"""x Wᵀ + bias in the dtype of x [..., in_features]; the fields of a TiledWeight one by one. No gradient passes."""

decode = torch.ops.elastiq.decode.default
"""Values [out_features, in_features], or [len(rows), in_features] of some rows, in `dtype`."""
