"""Powers of two of a matrix's rows, for rows whose numbers half precision does not hold well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .part import Kept, Part

LEAST, MOST = 2.0**-9, 2.0**10
"""Rows whose largest weight lies between these are stored as they are: their scales at every width, and what is stored
beside codes, are numbers that half precision holds well (`Format.least`, where its numbers are larger than usual)."""
_LOWEST, _HIGHEST = -126, 127  # what float32 holds


@dataclass(frozen=True)
class RowPowers(Part, kind="row-powers"):
    """W = 2^exponent W' row by row, W' being what folds, codes and side terms stand for. exponent: int8 [out]."""

    exponent: Tensor
    in_features: int

    @classmethod
    def of(cls, weight: Tensor, least: float = LEAST) -> Self | None:
        """Those that bring the largest weight of `weight` [out, in], and after that the one of every row, to between
        1/2 and 1 unless it lies between `least` and `MOST`; None if all do."""
        common = common_power([weight], least)
        largest = weight.abs().amax(1).double() / common
        apart = (largest > 0) & ((largest < least) | (largest >= MOST))
        if common == 1 and not bool(apart.any()):
            return None
        exponent = torch.where(apart, torch.frexp(largest).exponent, 0) + round(math.log2(common))
        return cls(exponent.clamp(_LOWEST, _HIGHEST).to(torch.int8), weight.shape[1])

    @property
    def factor(self) -> Tensor:
        """[out] float32, exactly."""
        return (self.exponent.clamp_min(_LOWEST).int() + 127 << 23).view(torch.float32)

    def into(self, weight: Tensor) -> Tensor:
        """W' of `weight` [out, in]."""
        return weight / self.factor[:, None]

    def out_of(self, weight: Tensor) -> Tensor:
        """W of `weight` [out, in]."""
        return weight * self.factor[:, None]

    def kept(self) -> dict[str, Kept]:
        return {"exponent": Kept(self.exponent)}

    def facts(self) -> dict[str, Any]:
        return {"shape": [len(self.exponent), self.in_features]}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        exponent, (rows, width) = arrays["exponent"], facts["shape"]
        if exponent.dtype != torch.int8 or exponent.shape != (rows,):
            raise ValueError(f"exponents are {exponent.dtype} {list(exponent.shape)}, not int8 [{rows}]")
        return cls(exponent, int(width))


def common_power(matrices: Sequence[Tensor], least: float = LEAST) -> float:
    """The power of two by which all of them together are divided so that their largest weight lies between 1/2 and 1; 1
    where it lies between `least` and `MOST`."""
    largest = max(float(matrix.abs().max()) for matrix in matrices)
    if not largest or least <= largest < MOST:
        return 1.0
    return 2.0 ** min(max(math.frexp(largest)[1], _LOWEST), _HIGHEST)
