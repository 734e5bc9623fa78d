"""Ways of storing the scales of a format: one number per row and group.

`encode_level` and `decode_level` are for the scales and zero points of nested codes, which every level has of its own.
Their readers take half precision, so that is what they decode to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .error import ElastiqError
from .sums import total

ArraySpec = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a stored array."""
MIN_SCALE = 2.0**-24
"""Smallest positive half-precision number: no stored scale is zero."""
_SECOND = 16
"""Neighbouring scales of a row that share a second-level range (SpQR, 2306.03078, section 4; K-quants take 8 or 16)."""


class ScaleStorage(ABC):
    """Scales [out, groups] float32 to arrays and back; a class that names itself registers.

    centred: of zero points it stores their distance from the middle of the range.
    """

    registry: ClassVar[dict[str, type[ScaleStorage]]] = {}
    bits: ClassVar[int]
    centred: ClassVar[bool] = False

    def __init_subclass__(cls, *, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        ScaleStorage.registry[name] = cls

    @classmethod
    def row(cls, groups: int) -> dict[str, tuple[torch.dtype, int]]:
        """Type and length of what is stored of a row, by suffix; empty where rows share something."""
        return {}

    @classmethod
    def row_bits(cls, groups: int) -> int:
        """Stored bits of a row, without what all rows share."""
        return sum(8 * dtype.itemsize * count for dtype, count in cls.row(groups).values()) or cls.bits * groups

    @staticmethod
    @abstractmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        """Arrays by suffix of their names."""

    @staticmethod
    @abstractmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """[out, groups] float32 as stored."""


def storage(name: str) -> type[ScaleStorage]:
    """Raises ElastiqError for a name there is not."""
    if name not in ScaleStorage.registry:
        raise ElastiqError(f"scales={name!r} is unknown; known: {', '.join(sorted(ScaleStorage.registry))}")
    return ScaleStorage.registry[name]


def rounded(name: str, scale: Tensor) -> Tensor:
    """`scale` [out, groups] as a reader will see it."""
    kind = storage(name)
    return kind.decode(kind.encode(scale), (scale.shape[0], scale.shape[1]))


def to_half(x: Tensor) -> Tensor:
    """float32 values as half precision stores them (saturating, never infinite)."""
    return x.clamp(-65504.0, 65504.0).half().float()


def encode_level(name: str, level: int, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    """Arrays by short name of the scales and zero points [..., out, groups] of one level, stored as `name` says.

    zero_point: None where it is the middle of the range.
    """
    found = {}
    for kind, values in (("scale", scale), ("zero_point", zero_point)):
        if values is None:
            continue
        if storage(name).centred and kind == "zero_point":
            values = values - _middle(level)
        for suffix, array in storage(name).encode(values.flatten(0, -2)).items():
            found[_short(name, kind, level, suffix)] = array.unflatten(0, values.shape[:-1])
    return found


def decode_level(
    name: str, level: int, arrays: Mapping[str, Tensor], groups: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """float16 scale and zero point [..., out, groups] of what `encode_level` gave; a scale is above zero."""
    kinds = ("scale",) if symmetric else ("scale", "zero_point")
    if name == "half":
        scale, *zero = (arrays[f"{kind}_{level}"] for kind in kinds)
        return scale, zero[0] if zero else None
    found = []
    for kind in kinds:
        own = {suffix: arrays[_short(name, kind, level, suffix)] for suffix in storage(name).row(groups)}
        rows = own[""].shape[:-1]
        flat = storage(name).decode({suffix: array.flatten(0, -2) for suffix, array in own.items()}, (-1, groups))
        found.append(flat.unflatten(0, rows))
    middle = _middle(level) if storage(name).centred else 0.0
    zero_point = None if symmetric else to_half(found[1] + middle).half()
    return to_half(found[0]).clamp_min(MIN_SCALE).half(), zero_point


def level_specs(name: str, level: int, shape: tuple[int, ...], symmetric: bool) -> dict[str, ArraySpec]:
    """Type and shape of those arrays for scales of `shape` [..., out, groups]."""
    return {
        _short(name, kind, level, suffix): (dtype, (*shape[:-1], count))
        for kind in (("scale",) if symmetric else ("scale", "zero_point"))
        for suffix, (dtype, count) in storage(name).row(shape[-1]).items()
    }


def _short(name: str, kind: str, level: int, suffix: str) -> str:
    return f"{kind}_{level}" if name == "half" else f"{kind}_{level}{suffix or '_codes'}"


def _middle(level: int) -> float:
    return (2**level - 1) / 2


def _exponent(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x, its exponent; at least the one of the smallest half."""
    return x.double().clamp_min(MIN_SCALE).log2().ceil()


class Half(ScaleStorage, name="half"):
    """float16."""

    @classmethod
    def row(cls, groups: int) -> dict[str, tuple[torch.dtype, int]]:
        return {"": (torch.float16, groups)}

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        return {"": to_half(scale).half()}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return arrays[""].float().view(shape)


class Single(ScaleStorage, name="float"):
    """float32."""

    bits = 32

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        return {"": scale.float()}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return arrays[""].view(shape)


class PowerOfTwo(ScaleStorage, name="e8m0"):
    """8 bits of exponent, as OCP MX scales."""

    bits = 8

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        return {"": (torch.log2(scale.double()).round() + 127).clamp(0, 254).to(torch.uint8)}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return torch.exp2(arrays[""].double() - 127).float().view(shape)


class Float8(ScaleStorage, name="e4m3"):
    """FP8 E4M3 times one float32 of the matrix that brings the largest to 448, as NVFP4."""

    bits = 8

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        top = (scale.abs().max() / 448).clamp_min(torch.finfo(torch.float32).tiny)
        small = (scale / top).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": small.view(torch.uint8), "_top": top.view(1)}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return (arrays[""].view(torch.float8_e4m3fn).float() * arrays["_top"]).view(shape)


class RowFloat8(ScaleStorage, name="e4m3-row"):
    """FP8 E4M3 times a power of two per row. What is read back and stored again stays the same."""

    centred = True

    @classmethod
    def row(cls, groups: int) -> dict[str, tuple[torch.dtype, int]]:
        return {"": (torch.uint8, groups), "_row": (torch.int8, 1)}

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        power = _exponent(scale.abs().amax(1, keepdim=True) / 448)
        small = (scale / torch.exp2(power)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"": small.view(torch.uint8), "_row": power.to(torch.int8)}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return arrays[""].view(torch.float8_e4m3fn).float().view(shape) * torch.exp2(arrays["_row"].float())


class SecondLevel(ScaleStorage, name="int6"):
    """6-bit integers from a whole number on, times a power of two, per 16 neighbouring groups (SpQR, 2306.03078,
    section 4; K-quants). There steps and starts are any numbers; here what is read back and stored again stays the
    same, and half precision holds it."""

    @classmethod
    def row(cls, groups: int) -> dict[str, tuple[torch.dtype, int]]:
        blocks = -(-groups // _SECOND)
        return {"": (torch.uint8, 3 * -(-groups // 4)), "_first": (torch.int16, blocks), "_step": (torch.int8, blocks)}

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        blocks = F.pad(scale[None], (0, -scale.shape[1] % _SECOND), mode="replicate")[0].unflatten(1, (-1, _SECOND))
        blocks = blocks.double()
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        size = torch.maximum(low.abs(), high.abs())
        power = torch.maximum(_exponent((high - low) / 63), _exponent(size / 2047))
        for _ in range(2):  # rounding may make a range longer by one
            unit = torch.exp2(power)
            first = (low / unit).round()
            power += ((high / unit).round() - first > 63).double()
        codes = (blocks / unit).round().sub_(first).to(torch.uint8).flatten(1)
        codes = codes[:, : 4 * -(-scale.shape[1] // 4)]
        four = codes.unflatten(1, (-1, 4)).int()  # four codes of 6 bits make three bytes
        word = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8).flatten(1)
        return {"": packed, "_first": first[..., 0].to(torch.int16), "_step": power[..., 0].to(torch.int8)}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        three = arrays[""].unflatten(1, (-1, 3)).int()
        word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        codes = torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).flatten(1)
        first, unit = (arrays[name].repeat_interleave(_SECOND, 1)[:, : codes.shape[1]] for name in ("_first", "_step"))
        return ((codes + first).float() * torch.exp2(unit.float()))[:, : shape[1]].contiguous()


class DoubleQuantized(ScaleStorage, name="double"):
    """8-bit dynamic floats of what exceeds the mean, per 256 scales in row order (QLoRA, 2305.14314, section 3)."""

    bits = 8

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        flat = scale.flatten()
        mean = flat.new_tensor(total(flat) / len(flat))
        blocks = F.pad(flat - mean, (0, -flat.numel() % 256)).view(-1, 256)
        top = blocks.abs().amax(1)
        table = _dynamic_table()
        unit = (blocks / top.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).clamp(-1, 1)
        codes = torch.searchsorted((table[1:] + table[:-1]) / 2, unit.contiguous())
        return {"": codes.to(torch.uint8).flatten()[: flat.numel()], "_top": top, "_mean": mean.view(1)}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        table = _dynamic_table().to(arrays[""].device)
        block = torch.arange(arrays[""].numel(), device=table.device) // 256
        return (table[arrays[""].long()] * arrays["_top"][block] + arrays["_mean"]).view(shape)


@cache
def _dynamic_table() -> Tensor:
    """[256] ascending: bitsandbytes' dynamic map with 7 exponent places, signed (8-bit optimizers, 2110.02861)."""
    found = [0.0, 1.0]
    for place in range(7):
        edges = torch.linspace(0.1, 1, 2**place + 1)
        means = (edges[:-1] + edges[1:]) / 2
        found += (10.0 ** (place - 6) * means).tolist()
        found += (-(10.0 ** (place - 6)) * means).tolist()
    return torch.tensor(sorted(found))
