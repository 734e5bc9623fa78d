"""Directories of compressed-tensors, as vLLM, SGLang and transformers read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec, ElastiqError
from ..models.fused import fused_groups
from ..runtime.stored import StoredMatrix
from .bit_stream import pack_stream, unpack_stream
from .compressed_float import float_kind
from .integer import IntegerTarget, Packed, unpacked_modules
from .target import ExportedMatrix, relative_error
from .view import View


@dataclass(frozen=True)
class CompressedTensors(IntegerTarget, name="compressed-tensors"):
    """The format pack-quantized, one group of modules per width; for small floats the format that holds them unchanged.

    asymmetric: keep zero points, which servers take at 4 and 8 bits only. Without them 2 and 3 bits are fitted to the
    widest level, because their own codes do not fit. exact: also leave every NVFP4 matrix its own global scale; without
    it matrices that servers read as one (query, key and value; gate and up) share theirs, because they take only one.
    """

    widths = (2, 3, 4, 5, 6, 7, 8)

    exact: bool = False
    asymmetric: bool = False

    def check(self, view: View) -> None:
        super().check(view)
        for name, bits in view.widths.items():
            if view.matrices[name].role != "linear":
                continue
            if not view.matrices[name].coded:
                float_kind(view.matrices[name])
            elif self.asymmetric and bits not in (4, 8):
                raise ElastiqError(
                    f"{self.name}: {name} is read at {bits} bits, and readers take zero points at 4 and 8 only; "
                    "leave --asymmetric out"
                )

    def symmetric(self, bits: int) -> bool:
        return not self.asymmetric

    def arrays(self, stored: StoredMatrix, bits: int) -> dict[str, ArraySpec]:
        if not stored.coded:
            return float_kind(stored).arrays(stored)
        out_features, in_features = stored.shape
        groups = in_features // stored.group_size
        specs: dict[str, ArraySpec] = {
            "weight_packed": (torch.int32, (out_features, in_features * bits // 32)),
            "weight_scale": (torch.float16, (out_features, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if self.asymmetric:
            specs["weight_zero_point"] = (torch.int32, (out_features * bits // 32, groups))
        return specs

    def known(self, stored: StoredMatrix) -> dict[str, Tensor]:
        return {"weight_shape": torch.tensor(stored.shape)} if stored.coded else {}

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        arrays = {
            "weight_packed": pack_stream(packed.codes, packed.bits),
            "weight_scale": packed.scale.half(),
            "weight_shape": torch.tensor(packed.codes.shape),
        }
        if self.asymmetric:
            arrays["weight_zero_point"] = pack_stream(packed.zero.T, packed.bits).T.contiguous()
        return arrays

    def unpack(self, arrays: dict[str, Tensor], stored: StoredMatrix, bits: int) -> Tensor:
        return compressed_dense(arrays, bits) if stored.coded else float_kind(stored).unpack(arrays)

    def pack_matrix(self, view: View, name: str) -> tuple[dict[str, Tensor], ExportedMatrix]:
        stored = view.matrices[name]
        if stored.coded:
            return super().pack_matrix(view, name)
        kind = float_kind(stored)
        top = None if self.exact or not kind.global_scale else _shared_top(view, name)
        arrays = kind.pack(view.table(name), stored, top)
        error = relative_error(view.dense(name), kind.unpack(arrays))
        count = 8 * sum(array.nbytes for array in arrays.values())
        return arrays, ExportedMatrix(name, kind.bits, kind.format, count, stored.num_weights, kind.bits, error)

    def settings(self, view: View, packed: dict[str, int]) -> dict[str, Any]:
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, bits in packed.items():
            scheme = self._scheme(view.matrices[name], bits)
            schemes.setdefault(json.dumps(scheme), (scheme, []))[1].append(name)
        groups = {
            f"group_{index}": {"targets": ["Linear"] if len(schemes) == 1 else names, **scheme}
            for index, (_, (scheme, names)) in enumerate(sorted(schemes.items()))
        }
        formats = {scheme["format"] for scheme, _ in schemes.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": unpacked_modules(view, packed),
            "config_groups": groups,
        }

    def _scheme(self, stored: StoredMatrix, bits: int) -> dict[str, Any]:
        """How a matrix is held, in the words of config.json."""
        name, weights = "pack-quantized", {
            "num_bits": bits,
            "type": "int",
            "symmetric": not self.asymmetric,
            "strategy": "group",
            "group_size": stored.group_size,
            "dynamic": False,
        }
        if not stored.coded:
            name, weights = float_kind(stored).format, float_kind(stored).weights(stored)
        return {"weights": weights, "input_activations": None, "output_activations": None, "format": name}


def _shared_top(view: View, name: str) -> Tensor:
    """The largest global scale [1] of the matrices that are read as one with `name`."""
    linear = [other for other, stored in view.matrices.items() if stored.role == "linear"]
    group = next(group for group in fused_groups(linear) if name in group)
    return torch.stack([view.table(other).grid.scales[view.widths[other]]["_top"] for other in group]).amax(0)


def compressed_dense(arrays: dict[str, Tensor], bits: int) -> Tensor:
    """Values float32 [out, in] of the arrays of one layer."""
    rows, columns = (int(size) for size in arrays["weight_shape"])
    scale = arrays["weight_scale"].float()
    zero = torch.full_like(scale, 2 ** (bits - 1))
    if "weight_zero_point" in arrays:
        zero = unpack_stream(arrays["weight_zero_point"].T, bits, rows).T.float()
    codes = unpack_stream(arrays["weight_packed"], bits, columns).float()
    group = torch.arange(columns) // (columns // scale.shape[1])
    if "weight_g_idx" in arrays:  # groups of channels that need not be neighbours
        group = arrays["weight_g_idx"].long()
    return (codes - zero[:, group]) * scale[:, group]
