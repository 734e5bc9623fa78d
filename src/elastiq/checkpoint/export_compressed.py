"""Directories of compressed-tensors, as vLLM, SGLang and transformers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ElastiqError
from ..runtime.stored import ArraySpec
from .bit_stream import pack_stream, unpack_stream
from .export_integer import IntegerTarget, Packed, unpacked_modules
from .view import View


@dataclass(frozen=True)
class CompressedTensors(IntegerTarget, name="compressed-tensors"):
    """The format pack-quantized, one group of modules per width.

    asymmetric: keep zero points, which servers take at 4 and 8 bits only. Without them 2 and 3 bits are fitted to the
    widest level, because their own codes do not fit.
    """

    widths = (2, 3, 4, 5, 6, 7, 8)

    exact: bool = False
    asymmetric: bool = False

    def check(self, view: View) -> None:
        super().check(view)
        for name, bits in view.widths.items():
            if self.asymmetric and view.matrices[name].role == "linear" and bits not in (4, 8):
                raise ElastiqError(
                    f"{self.name}: {name} is read at {bits} bits, and readers take zero points at 4 and 8 only; "
                    "leave --asymmetric out"
                )

    def symmetric(self, bits: int) -> bool:
        return not self.asymmetric

    def arrays(self, shape: tuple[int, ...], bits: int, group_size: int) -> dict[str, ArraySpec]:
        out_features, in_features = shape
        groups = in_features // group_size
        specs: dict[str, ArraySpec] = {
            "weight_packed": (torch.int32, (out_features, in_features * bits // 32)),
            "weight_scale": (torch.float16, (out_features, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if self.asymmetric:
            specs["weight_zero_point"] = (torch.int32, (out_features * bits // 32, groups))
        return specs

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        arrays = {
            "weight_packed": pack_stream(packed.codes, packed.bits),
            "weight_scale": packed.scale.half(),
            "weight_shape": torch.tensor(packed.codes.shape),
        }
        if self.asymmetric:
            arrays["weight_zero_point"] = pack_stream(packed.zero.T, packed.bits).T.contiguous()
        return arrays

    def unpack(self, arrays: dict[str, Tensor], bits: int) -> Tensor:
        return compressed_dense(arrays, bits)

    def settings(self, view: View, packed: dict[str, int]) -> dict[str, Any]:
        kinds: dict[tuple[int, int], list[str]] = {}
        for name, bits in packed.items():
            kinds.setdefault((bits, view.matrices[name].group_size), []).append(name)
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": not self.asymmetric,
                    "strategy": "group",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for index, ((bits, size), names) in enumerate(sorted(kinds.items()))
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": unpacked_modules(view, packed),
            "config_groups": groups,
        }


def compressed_dense(arrays: dict[str, Tensor], bits: int) -> Tensor:
    """Values float32 [out, in] of the arrays of one layer."""
    rows, columns = (int(size) for size in arrays["weight_shape"])
    scale = arrays["weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in arrays:
        zero = unpack_stream(arrays["weight_zero_point"].T, bits, rows).T.float()
    size = columns // scale.shape[1]
    codes = unpack_stream(arrays["weight_packed"], bits, columns).float()
    return (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)
