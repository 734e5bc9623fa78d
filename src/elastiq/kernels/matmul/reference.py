"""The readable twin, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import derive
from ...linalg import unpack_planes
from .tiles import ROWS
from .weight import TiledWeight


def decode(weight: TiledWeight, rows: Tensor | None = None) -> Tensor:
    """Values float32 [out_features, in_features], or [len(rows), in_features] of some rows.

    Raises IndexError for rows that the matrix does not have.
    """
    every = torch.arange(weight.out_features, device=weight.scale.device)
    rows = every if rows is None else every[rows]
    block, row = rows // ROWS, rows % ROWS
    planes = [plane[block, :, row] for plane in weight.planes]  # [rows, tiles, 4]
    codes = unpack_planes(planes, planes[0].shape[-1] * 8)
    # Byte i of a tile holds inputs 4 j + i: [rows, tiles, i, j] to [rows, tiles, j, i].
    codes = codes.unflatten(-1, (4, 8)).transpose(-1, -2).flatten(1)[:, : weight.in_features]
    scale, zero_point = (x[block, :, row].float() for x in _grid(weight))
    if weight.level != weight.bits:
        scale, zero_point = derive(scale, zero_point, weight.level, weight.bits)
    group = torch.arange(weight.in_features, device=codes.device) // weight.group_size
    return (codes.float() - zero_point[:, group]) * scale[:, group]


def matmul(x: Tensor, weight: TiledWeight, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [..., out_features] of x [..., in_features], in the dtype of x."""
    return F.linear(x, decode(weight).to(x.dtype), bias)


def _grid(weight: TiledWeight) -> tuple[Tensor, Tensor]:
    if weight.zero_point is not None:
        return weight.scale, weight.zero_point
    return weight.scale, torch.full_like(weight.scale, (2**weight.level - 1) / 2)
