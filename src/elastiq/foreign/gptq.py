"""GPTQ directories, as AutoGPTQ, GPT-QModel, vLLM and transformers read them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec
from ..runtime.stored import StoredMatrix
from .bit_stream import pack_stream, unpack_stream
from .integer import IntegerTarget, Packed, main_width
from .view import View

_ZERO_POINTS_AS = "gptqmodel:0.9.0"
"""GPT-QModel takes asymmetric directories of version 1 only where this stands, since others had wrong zero points."""


@dataclass(frozen=True)
class GPTQDirectory(IntegerTarget, name="gptq"):
    """Codes packed along the inputs. version: 1 stores every zero point less one, 2 as it is."""

    widths = (2, 3, 4, 8)
    lowest_zero = 1

    exact: bool = False
    version: int = 1

    def arrays(self, stored: StoredMatrix, bits: int) -> dict[str, ArraySpec]:
        out_features, in_features = stored.shape
        groups = in_features // stored.group_size
        return {
            "qweight": (torch.int32, (in_features * bits // 32, out_features)),
            "qzeros": (torch.int32, (groups, out_features * bits // 32)),
            "scales": (torch.float16, (groups, out_features)),
            "g_idx": (torch.int32, (in_features,)),
        }

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        less = 1 if self.version == 1 else 0
        return {
            "qweight": pack_stream(packed.codes, packed.bits).T.contiguous(),
            "qzeros": pack_stream(packed.zero.T - less, packed.bits),
            "scales": packed.scale.T.half().contiguous(),
            "g_idx": (torch.arange(packed.codes.shape[1]) // packed.group_size).int(),
        }

    def unpack(self, arrays: dict[str, Tensor], stored: StoredMatrix, bits: int) -> Tensor:
        return gptq_dense(arrays, bits, 1 if self.version == 1 else 0)

    def settings(self, view: View, packed: dict[str, int]) -> dict[str, Any]:
        main = main_width(packed)
        others = {name: bits for name, bits in packed.items() if bits != main}
        sizes = {view.matrices[name].group_size for name in packed}
        data: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": main,
            "group_size": max(sizes),
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "true_sequential": False,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": ["elastiq", _ZERO_POINTS_AS]},
        }
        if others:
            data["dynamic"] = {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in others.items()}
        return data


def gptq_dense(arrays: dict[str, Tensor], bits: int, less: int) -> Tensor:
    """Values float32 [out, in] of the arrays of one layer; less: what was taken from the stored zero points."""
    inputs = arrays["g_idx"].numel()
    codes = unpack_stream(arrays["qweight"].T, bits, inputs).float()
    scale = arrays["scales"].float()
    zero = unpack_stream(arrays["qzeros"], bits, scale.shape[1]).float() + less
    group = arrays["g_idx"].long()
    return (codes - zero[group].T) * scale[group].T
