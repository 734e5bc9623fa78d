"""Codes packed one after another into 32-bit words, lowest bits first, as most integer formats store them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """int32 [rows, ceil(columns * bits / 32)] of codes [rows, columns]: code i begins at bit i * bits of its row."""
    rows, columns = codes.shape
    spread = (codes.int().unsqueeze(-1) >> torch.arange(bits)) & 1
    flat = torch.nn.functional.pad(spread.reshape(rows, columns * bits), (0, -columns * bits % 32))
    octets = (flat.reshape(rows, -1, 8) << torch.arange(8)).sum(-1).to(torch.uint8)
    return octets.contiguous().view(torch.int32)


def unpack_stream(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes uint8 [rows, columns] from int32 words [rows, at least ceil(columns * bits / 32)]."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(columns) * bits
    word, shift = first // 32, first % 32
    following = torch.nn.functional.pad(wide, (0, 1))
    pair = following[:, word] | following[:, word + 1] << 32
    return ((pair >> shift) & (2**bits - 1)).to(torch.uint8)
