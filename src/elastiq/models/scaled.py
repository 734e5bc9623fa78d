"""Weights stored in 8 bits with scales beside them, as most new models come: which layouts are known, their values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import ElastiqError

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_SCALES = ("_scale_inv", "_scale")
"""What a scale's name adds to its tensor's: DeepSeek and its followers, everybody else. Both are multiplied by."""
_ZERO_POINT = "_zero_point"
_ROW_SCALE = "SCB"
"""Largest magnitudes of the rows beside an int8 `weight`, as bitsandbytes saves them: 127 stands for them."""
_BESIDE = frozenset({
    "weight", "bias", "weight_scale", "weight_scale_inv", "weight_zero_point", _ROW_SCALE, "weight_format",
    "input_scale", "input_scale_ub", "input_zero_point", "output_scale", "output_zero_point", "activation_scale",
})  # fmt: skip
"""Arrays of a linear layer that say nothing of its weight, or what is known here; others may change what it means."""
_FORMATS = ("naive-quantized", "float-quantized", "int-quantized")
"""Formats of compressed-tensors that hold one code in a byte."""
_USUAL_BLOCK = 128


def is_eight_bit(settings: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is of a kind whose weights are read here, as 8-bit numbers with scales."""
    method = settings.get("quant_method")
    if method == "bitsandbytes":
        return settings.get("load_in_8bit") is True
    if method == "modelopt":
        return str(settings.get("quant_algo", "FP8")).startswith("FP8")
    if method != "compressed-tensors":
        return method in ("fp8", "fbgemm_fp8")
    formats = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    sparsity = settings.get("sparsity_config") or {}
    plain = not settings.get("transform_config") and isinstance(sparsity, dict)
    known = all(kind is None or kind in _FORMATS for kind in formats)
    return plain and known and sparsity.get("format", "dense") == "dense"


class Scaling:
    """How the 8-bit tensors among `names`, those of the model directory `path`, become weights.

    settings: its quantization_config, if it has one; only the sizes of blocks are taken from it, for what is scaled
    how is said by the arrays. companions: names of arrays that belong to others.
    """

    def __init__(self, path: Path, names: Collection[str], settings: Mapping[str, Any]) -> None:
        self._path, self._names = path, frozenset(names)
        self._layers: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._layers[name.rpartition(".")[0]].append(name)
        self._blocks = _block_sizes(settings)
        found = {name + end for name in names for end in (*_SCALES, _ZERO_POINT)}
        found |= {_beside(name, end) for name in names for end in (_ROW_SCALE, "weight_format")}
        self.companions = frozenset(found & self._names)

    def weights(self, name: str, stored: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` as it was `stored`, or float32 of its codes, scales and zero points, which `read` gets.

        Integers without scales are as stored. Raises ElastiqError, naming the tensor, where a layout is not known.
        """
        if stored.dtype not in FLOAT8 and stored.dtype != torch.int8:
            return stored
        found = [name + end for end in _SCALES if name + end in self._names]
        rows = _beside(name, _ROW_SCALE)
        if not found and rows in self._names and stored.dtype == torch.int8:
            return stored.float() * self._spread(name, read(rows).float() / 127.0, stored.shape)
        if not found and stored.dtype == torch.int8:
            return stored
        if len(found) != 1 or (strange := self._strange(name)):
            beside = ", ".join(found or ["no scale"]) if len(found) != 1 else ", ".join(strange)
            raise self._unknown(name, stored, f"{beside} beside it")
        scale = read(found[0])
        if not scale.is_floating_point():
            raise self._unknown(name, stored, f"scales in {_plain(scale)}")
        values = stored.float()
        if name + _ZERO_POINT in self._names:
            values -= self._spread(name, read(name + _ZERO_POINT).float(), stored.shape)
        values *= self._spread(name, scale.float(), stored.shape)
        return values

    def _strange(self, name: str) -> list[str]:
        """Arrays of the same layer, or named after the tensor, that could change what its codes mean."""
        layer, _, short = name.rpartition(".")
        own = self._layers[layer]
        if short == "weight":
            return sorted(other for other in own if other.rpartition(".")[2] not in _BESIDE)
        known = {name + end for end in (*_SCALES, _ZERO_POINT)}
        return sorted(other for other in own if other.startswith(f"{name}_") and other not in known)

    def _spread(self, name: str, scale: Tensor, shape: torch.Size) -> Tensor:
        """`scale`, of the whole, of rows or of blocks of the last axes, in a shape that multiplies one of `shape`."""
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.dim() == 4 and scale.shape[1] == scale.shape[3] == 1:  # blocks as ModelOpt writes them
            scale = scale[:, 0, :, 0]
        if scale.dim() == 1 and len(shape) == 2:
            scale = scale[:, None]
        fits = scale.dim() == len(shape) >= 2 and scale.shape[:-2] in (shape[:-2], (1,) * (len(shape) - 2))
        for axis, sizes in ((-2, self._blocks[0]), (-1, self._blocks[1])) if fits else ():
            count, size = scale.shape[axis], shape[axis]
            if count in (1, size):
                continue
            possible = sizes or {_USUAL_BLOCK, *([size // count] if count and size % count == 0 else [])}
            block = [b for b in possible if -(-size // b) == count]
            if len(block) != 1:
                fits = False
                break
            scale = scale.repeat_interleave(block[0], dim=axis).narrow(axis, 0, size)
        if not fits:
            raise ElastiqError(
                f"{self._path}: {name} of {list(shape)} has scales of {list(scale.shape)}, and it is not known which "
                "belongs where; give the 16-bit model"
            )
        return scale

    def _unknown(self, name: str, stored: Tensor, what: str) -> ElastiqError:
        return ElastiqError(
            f"{self._path}: {name} is stored in {_plain(stored)} with {what}, a layout that is not known; "
            "give the 16-bit model"
        )


def _beside(name: str, short: str) -> str:
    """Another array of the layer that the tensor `name` belongs to."""
    return f"{name.rpartition('.')[0]}.{short}"


def _plain(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _block_sizes(settings: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """(rows, columns) of the blocks that share a scale, as far as the settings say."""
    weights = [group["weights"] for group in _groups(settings) if isinstance(group.get("weights"), dict)]
    pairs = [settings.get("weight_block_size"), *(part.get("block_structure") for part in weights)]
    pairs += [[1, part.get("group_size")] for part in weights]
    sizes = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    rows, columns = ({pair[axis] for pair in sizes if _is_size(pair[axis])} for axis in (0, 1))
    return rows - {1}, columns - {1}


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0
