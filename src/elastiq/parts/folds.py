"""Maps of a matrix's input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from ..core import ElastiqError, Fold, Kept, Stats, to_half
from ..linalg import pack_planes, unpack_planes
from ..linalg.hadamard import LANES, mix, walsh

_MAX_ODD = 2**13
"""Largest matrix of what is not a power of two: 256 MB."""


@dataclass(frozen=True)
class Diagonal(Fold, kind="diagonal"):
    """T x = x / scale, with scale float16 [in]."""

    scale: Tensor

    @staticmethod
    def of(scale: Tensor) -> Diagonal:
        """The nearest that half precision holds."""
        return Diagonal(to_half(scale).clamp_min(2.0**-14).half())

    def channels(self) -> int:
        return len(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale.to(x.dtype)

    def into(self, weight: Tensor) -> Tensor:
        return weight * self.scale.float()

    def out_of(self, weight: Tensor) -> Tensor:
        return weight / self.scale.float()

    def divisor(self) -> Tensor:
        return self.scale.float()

    def stats(self, stats: Stats) -> Stats:
        return stats.divided(self.scale.float())

    def kept(self) -> dict[str, Kept]:
        return {"scale": Kept(self.scale)}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        return cls(arrays["scale"])


@dataclass(frozen=True)
class Hadamard(Fold, kind="hadamard"):
    """T = (H_p ⊗ C_m) diag(signs) for in = p m with p the largest power of two: Walsh-Hadamard of size p and, where
    the size is not a power of two, the orthogonal Hartley matrix C_m of what is left; both normalised.

    signs: one bit per channel, uint8 [ceil(in / 8)]. Raises ElastiqError for others, and for an odd part over 8192.
    """

    signs: Tensor
    in_features: int

    def __post_init__(self) -> None:
        size = self.in_features
        if self.signs.dtype != torch.uint8 or self.signs.shape != (-(-size // 8),) or size < 1:
            raise ElastiqError(f"hadamard: signs {list(self.signs.shape)} are not those of {size} channels")
        if size // (size & -size) > _MAX_ODD:
            raise ElastiqError(f"hadamard: {size} channels cannot be rotated; too little of that is a power of two")

    @staticmethod
    def of(signs: Tensor) -> Hadamard:
        """From bool [in]."""
        return Hadamard(pack_planes(signs.to(torch.uint8), 1)[0], len(signs))

    def channels(self) -> int:
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, *self.rotation())

    def into(self, weight: Tensor) -> Tensor:
        return self.forward(weight)  # W Tᵀ: every row goes the way of x

    def out_of(self, weight: Tensor) -> Tensor:
        factors, rest = self.rotation()
        return mix(weight, factors.abs(), rest) * factors.sign().to(weight)  # H ⊗ R is symmetric: its own inverse

    def rotation(self) -> tuple[Tensor, Tensor]:
        signs = unpack_planes([self.signs], self.in_features).float() * 2 - 1
        return signs / math.sqrt(self.in_features & -self.in_features), _rest(self.in_features).to(signs.device)

    def stats(self, stats: Stats) -> Stats:
        hessian, mean = stats.get("hessian"), stats.get("mean")
        sums = {} if mean is None else {"mean": self.forward(mean)}
        if hessian is not None:
            sums["hessian"] = self.forward(self.forward(hessian).T).contiguous()
            sums["diagonal"] = sums["hessian"].diagonal().clone()
        return Stats(stats.count, stats.total, stats.dropped, sums)

    def kept(self) -> dict[str, Kept]:
        return {"signs": Kept(self.signs)}

    def facts(self) -> dict[str, Any]:
        return {"in_features": self.in_features}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        return cls(arrays["signs"], int(facts["in_features"]))


@cache
def _rest(in_features: int) -> Tensor:
    """[size, size] of what compiled code multiplies by: all that is not a power of two, and enough of that."""
    power = in_features & -in_features
    odd, inner = in_features // power, 1
    while inner < power and inner * odd < LANES:
        inner *= 2
    return torch.kron(walsh(inner), _hartley(odd).float())


def _hartley(size: int) -> Tensor:
    """[size, size] symmetric and orthogonal, float64: (cos + sin)(2 pi i j / size) / sqrt(size)."""
    turn = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * (turn * turn[:, None] % size) / size
    return (angle.cos() + angle.sin()) / math.sqrt(size)
