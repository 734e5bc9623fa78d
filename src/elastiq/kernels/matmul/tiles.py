"""Tile order: bit planes and scales as the products read them.

A plane of the checkpoint is uint8 [..., out, ceil(in / 8)], input 8 j + k of a row being bit k of byte j. In tile order
it is uint8 [..., blocks, tiles, 16, 4]: tiles of 16 rows by 32 inputs, padded with zeros, input 4 j + i of a tile's row
being bit j of byte i. Scales [..., out, groups] become [..., blocks, groups, 16].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...linalg import native

ROWS = 16
INPUTS = 32
_SWAPS = ((1, 0x22222222), (2, 0x0C0C0C0C), (4, 0x00F000F0), (8, 0x0000FF00))


def tile_plane(plane: Tensor) -> Tensor:
    """Tile order of a plane uint8 [..., out, ceil(in / 8)]."""
    rows, width = plane.shape[-2:]
    tiled = torch.empty(
        *plane.shape[:-2], -(-rows // ROWS), -(-width // 4), ROWS, 4, dtype=torch.uint8, device=plane.device
    )
    if native.module is None or native.current() == "torch" or not plane.is_cpu:
        words = F.pad(plane, (0, -width % 4, 0, -rows % ROWS)).contiguous().view(torch.int32)
        turned = _unshuffle(_unshuffle(words)).unflatten(-2, (-1, ROWS)).transpose(-1, -2)
        return tiled.copy_(turned.contiguous().view(torch.uint8).unflatten(-1, (ROWS, 4)))
    plane = plane.contiguous()
    for source, target in zip(plane.view(-1, rows, width), tiled.view(-1, *tiled.shape[-4:]), strict=True):
        native.module.tile(
            native.current(), source.data_ptr(), rows, width, target.data_ptr(), torch.get_num_threads()
        )
    return tiled


def untile_plane(tiled: Tensor, rows: int, inputs: int) -> Tensor:
    """The plane [..., rows, ceil(inputs / 8)] that `tile_plane` was given."""
    words = tiled.contiguous().view(torch.int32).squeeze(-1).transpose(-1, -2).flatten(-3, -2).contiguous()
    for _ in range(3):  # the turn by two of five places, undone by turning on
        words = _unshuffle(words)
    return words.view(torch.uint8)[..., :rows, : -(-inputs // 8)].contiguous()


def tile_scale(scale: Tensor) -> Tensor:
    """[..., blocks, groups, 16] of scales or zero points [..., out, groups]; rows that only fill a block are zeros."""
    rows, groups = scale.shape[-2:]
    if native.module is not None and native.current() != "torch" and scale.is_cpu and scale.dtype == torch.float16:
        scale, tiled = scale.contiguous(), scale.new_empty(*scale.shape[:-2], -(-rows // ROWS), groups, ROWS)
        for source, target in zip(scale.view(-1, rows, groups), tiled.view(-1, *tiled.shape[-3:]), strict=True):
            native.module.tile_scale(source.data_ptr(), rows, groups, target.data_ptr(), torch.get_num_threads())
        return tiled
    padded = F.pad(scale, (0, 0, 0, -scale.shape[-2] % ROWS))
    return padded.unflatten(-2, (-1, ROWS)).transpose(-1, -2).contiguous()


def untile_scale(tiled: Tensor, rows: int) -> Tensor:
    """The scales [..., rows, groups] that `tile_scale` was given."""
    return tiled.transpose(-1, -2).flatten(-3, -2)[..., :rows, :].contiguous()


def _unshuffle(words: Tensor) -> Tensor:
    """Bits of even places of each int32 to its low half, of odd ones to the high half."""
    for shift, mask in _SWAPS:
        swap = (words ^ (words >> shift)) & mask
        words = words ^ swap ^ (swap << shift)
    return words
