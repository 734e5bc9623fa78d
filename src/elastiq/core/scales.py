"""Ways of storing the scales of a format: one number per row and group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import MIN_SCALE, ElastiqError, to_half

_SECOND = 16
"""Neighbouring scales of a row that share a second-level range (SpQR, 2306.03078, section 4; K-quants take 8 or 16)."""


class ScaleStorage(ABC):
    """Scales [out, groups] float32 to arrays and back; a class that names itself registers."""

    registry: ClassVar[dict[str, type[ScaleStorage]]] = {}
    bits: ClassVar[int]

    def __init_subclass__(cls, *, name: str, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        ScaleStorage.registry[name] = cls

    @classmethod
    def row_bits(cls, groups: int) -> int:
        """Stored bits of a row, without what all rows share."""
        return cls.bits * groups

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


class Half(ScaleStorage, name="half"):
    """float16."""

    bits = 16

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


class SecondLevel(ScaleStorage, name="int6"):
    """6-bit integers in a float16 range per 16 neighbouring groups (SpQR, 2306.03078, section 4; K-quants)."""

    @classmethod
    def row_bits(cls, groups: int) -> int:
        return -(-groups // _SECOND) * (6 * _SECOND + 2 * 16)

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        padded = F.pad(scale[None], (0, -scale.shape[1] % _SECOND), mode="replicate")[0].unflatten(1, (-1, _SECOND))
        low = to_half(padded.amin(-1))
        step = to_half((padded.amax(-1) - low) / 63).clamp_min(MIN_SCALE)
        codes = ((padded - low[..., None]) / step[..., None]).round().clamp(0, 63).to(torch.uint8).flatten(1)
        four = codes.unflatten(1, (-1, 4)).int()  # four codes of 6 bits make three bytes
        word = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
        packed = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8).flatten(1)
        return {"": packed, "_low": low.half(), "_step": step.half()}

    @staticmethod
    def decode(arrays: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        three = arrays[""].unflatten(1, (-1, 3)).int()
        word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        codes = torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).flatten(1)
        low, step = (arrays[name].float()[..., None] for name in ("_low", "_step"))
        values = codes.unflatten(1, (-1, _SECOND)) * step + low
        return values.flatten(1)[:, : shape[1]].contiguous()


class DoubleQuantized(ScaleStorage, name="double"):
    """8-bit dynamic floats of what exceeds the mean, per 256 scales in row order (QLoRA, 2305.14314, section 3)."""

    bits = 8

    @staticmethod
    def encode(scale: Tensor) -> dict[str, Tensor]:
        flat = scale.flatten()
        mean = flat.mean()
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
