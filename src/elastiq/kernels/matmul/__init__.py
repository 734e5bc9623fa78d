"""Products with nested matrices, read from their bit planes in tile order.

Compilers and exporters see `torch.ops.elastiq.matmul` and `torch.ops.elastiq.decode`; compiled code runs behind them
where it can, else the readable twin.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from . import cpu, reference
from .tiles import tile_plane, tile_scale, untile_plane, untile_scale
from .weight import TiledWeight

__all__ = ["TiledWeight", "decode", "matmul", "tile_plane", "tile_scale", "untile_plane", "untile_scale"]

_library = torch.library.Library("elastiq", "DEF")
_library.define(
    "matmul(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero_point, Tensor? bias, int level, int out_features, "
    "int in_features, int group_size, str activations) -> Tensor"
)
_library.define(
    "decode(Tensor[] planes, Tensor scale, Tensor? zero_point, Tensor? rows, int level, int out_features, "
    "int in_features, int group_size, ScalarType dtype) -> Tensor"
)


def matmul(x: Tensor, weight: TiledWeight, bias: Tensor | None = None, activations: str = "int16") -> Tensor:
    """x Wᵀ + bias in the dtype of x [..., in_features]. No gradient passes.

    An operation of torch wherever anything else than this process looks on; called straight otherwise, which saves
    several microseconds.
    """
    if type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        path = cpu.path_for(x, x.dtype)
        return reference.matmul(x, weight, bias) if path is None else cpu.matmul(path, x, weight, bias, activations)
    return torch.ops.elastiq.matmul.default(x, *weight[:3], bias, *weight[3:], activations)


def decode(weight: TiledWeight, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [out_features, in_features], or [len(rows), in_features] of some rows, in `dtype`."""
    return torch.ops.elastiq.decode.default(*weight[:3], rows, *weight[3:], dtype)


_seen: dict[int, tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], TiledWeight]] = {}
"""The matrix that operations were last given with a first plane, by that plane's id, as long as the plane lives."""


def _weight(planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, *form: int) -> TiledWeight:
    """The matrix of these arrays; of the very arrays seen before, lying where they lay, it is not checked again."""
    if not planes:
        return TiledWeight(planes, scale, zero_point, *form)
    arrays = (*planes, scale) if zero_point is None else (*planes, scale, zero_point)
    key, places = id(planes[0]), (*map(Tensor.data_ptr, arrays), *form)
    held = _seen.get(key)
    if held is None or held[1] != places or any(r() is not a for r, a in zip(held[0], arrays, strict=True)):
        # Detached: this keeps the memory, so that nothing else can come to lie there, and lets the tensors go.
        zero_point = None if zero_point is None else zero_point.detach()
        weight = TiledWeight([plane.detach() for plane in planes], scale.detach(), zero_point, *form)
        first = weakref.ref(planes[0], lambda _: _seen.pop(key, None))
        _seen[key] = held = (first, *map(weakref.ref, arrays[1:])), places, weight
    return held[2]


def _matmul_op(x: Tensor, planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
               level: int, out_features: int, in_features: int, group_size: int,
               activations: str) -> Tensor:  # fmt: skip
    path = cpu.path_for(x, x.dtype)
    weight = _weight(planes, scale, zero_point, level, out_features, in_features, group_size)
    return reference.matmul(x, weight, bias) if path is None else cpu.matmul(path, x, weight, bias, activations)


def _decode_op(planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, rows: Tensor | None, level: int,
               out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    weight = TiledWeight(planes, scale, zero_point, level, out_features, in_features, group_size)
    path = cpu.path_for(scale, dtype)
    return reference.decode(weight, rows).to(dtype) if path is None else cpu.decode(path, weight, rows, dtype)


def _matmul_shape(x: Tensor, planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, bias: Tensor | None,
                  level: int, out_features: int, in_features: int, group_size: int,
                  activations: str) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _decode_shape(planes: list[Tensor], scale: Tensor, zero_point: Tensor | None, rows: Tensor | None, level: int,
                  out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> Tensor:  # fmt: skip
    count = out_features if rows is None else rows.shape[0]
    return scale.new_empty((count, in_features), dtype=dtype)


for name, body, shape in (("matmul", _matmul_op, _matmul_shape), ("decode", _decode_op, _decode_shape)):
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"elastiq::{name}", shape, lib=_library)
