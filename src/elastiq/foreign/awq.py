"""AWQ directories of the GEMM layout, four bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec
from ..runtime.stored import StoredMatrix
from .integer import IntegerTarget, Packed, unpacked_modules
from .view import View

_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Output channel (of eight) whose code is nibble i of a word."""


@dataclass(frozen=True)
class AWQDirectory(IntegerTarget, name="awq"):
    """Codes packed along the outputs, eight to a word in the order of `_ORDER`."""

    widths = (4,)

    exact: bool = False

    def arrays(self, stored: StoredMatrix, bits: int) -> dict[str, ArraySpec]:
        out_features, in_features = stored.shape
        groups = in_features // stored.group_size
        return {
            "qweight": (torch.int32, (in_features, out_features // 8)),
            "qzeros": (torch.int32, (groups, out_features // 8)),
            "scales": (torch.float16, (groups, out_features)),
        }

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        return {
            "qweight": _words(packed.codes.T),
            "qzeros": _words(packed.zero.T),
            "scales": packed.scale.T.half().contiguous(),
        }

    def unpack(self, arrays: dict[str, Tensor], stored: StoredMatrix, bits: int) -> Tensor:
        return awq_dense(arrays)

    def settings(self, view: View, packed: dict[str, int]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": max(view.matrices[name].group_size for name in packed),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": unpacked_modules(view, packed),
        }


def awq_dense(arrays: dict[str, Tensor]) -> Tensor:
    """Values float32 [out, in] of the arrays of one layer."""
    codes, zero, scale = _codes(arrays["qweight"]), _codes(arrays["qzeros"]), arrays["scales"].float()
    size = codes.shape[0] // scale.shape[0]
    return ((codes - zero.repeat_interleave(size, 0)) * scale.repeat_interleave(size, 0)).T.contiguous()


def _words(codes: Tensor) -> Tensor:
    """int32 [rows, columns / 8] of codes [rows, columns]."""
    nibbles = codes.unflatten(-1, (-1, 8))[..., _ORDER].reshape(len(codes), -1, 2).to(torch.uint8)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def _codes(words: Tensor) -> Tensor:
    nibbles = (words.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    return nibbles[..., _ORDER.argsort()].flatten(-2).float()
