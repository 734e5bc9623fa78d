"""Bit planes: plane 1 holds the most significant bit of every code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ElastiqError

_BITS = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
_SPREAD = _BITS.to(torch.uint8).contiguous().view(torch.int64).flatten()
"""[256] int64 whose eight bytes are the eight bits of the index, the lowest bit first."""


def pack_planes(codes: Tensor, bits: int) -> list[Tensor]:
    """`bits` planes uint8 [..., ceil(in / 8)] of codes uint8 [..., in], most significant first.

    Channel 8 j + k of a row is bit k (of value 2^k) of byte j; missing channels of the last byte are 0.
    """
    if codes.dtype != torch.uint8:
        raise ElastiqError(f"planes: codes must be uint8, not {codes.dtype}")
    width = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -width % 8)).unflatten(-1, (-1, 8))
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    return [(((padded >> (bits - 1 - p)) & 1) * weights).sum(dim=-1).to(torch.uint8) for p in range(bits)]


def unpack_planes(planes: list[Tensor], width: int) -> Tensor:
    """Codes uint8 [..., width] of `len(planes)` bits from planes uint8 [..., ceil(width / 8)]."""
    spread = _SPREAD.to(planes[0].device)
    codes = spread[planes[0].int()]
    for plane in planes[1:]:
        codes = (codes << 1) | spread[plane.int()]
    return codes.contiguous().view(torch.uint8)[..., :width]
