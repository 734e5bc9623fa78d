"""Tables of the numbers that codes stand for, by name."""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import Tensor

from ..core import ElastiqError

_FLOAT = re.compile(r"e([0-7])m([0-7])(fn|ieee)?")
_INT = re.compile(r"int([2-8])")

_NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA (2305.14314), appendix E: the values themselves, which its closed form gives only to a few digits."""
_FLOAT4 = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
"""bitsandbytes' fp4 by code; a set top bit is the sign."""


@cache
def values(name: str) -> Tensor:
    """[2^bits] float32 by code; what no number stands for (NaN, infinity) repeats the largest finite one.

    `eXmY`: a sign, X exponent bits biased by 2^(X-1) - 1, Y mantissa bits, subnormals, no infinities and no NaN (as OCP
    MX defines FP6 and FP4); `fn` after it gives the all-ones code to NaN (FP8 E4M3), `ieee` the whole top exponent to
    infinities and NaN (FP8 E5M2). `intN`: two's complement without its lowest number. `nf4`, `fp4`: as bitsandbytes.
    """
    if name == "nf4":
        return torch.tensor(_NORMAL_FLOAT)
    if name == "fp4":
        positive = torch.tensor(_FLOAT4)
        return torch.cat([positive, -positive])
    if match := _INT.fullmatch(name):
        return _integers(int(match[1]))
    if (match := _FLOAT.fullmatch(name)) and 1 <= int(match[1]) + int(match[2]) <= 7:
        return _minifloat(int(match[1]), int(match[2]), match[3] or "")
    raise ElastiqError(f"values: {name!r} is unknown; known: nf4, fp4, int2 to int8, eXmY, eXmYfn and eXmYieee")


def bits_of(name: str) -> int:
    """Width of the codes of a table."""
    return len(values(name)).bit_length() - 1


def _integers(bits: int) -> Tensor:
    codes = torch.arange(2**bits)
    signed = torch.where(codes < 2 ** (bits - 1), codes, codes - 2**bits)
    return signed.clamp_min(1 - 2 ** (bits - 1)).float()


def _minifloat(exponent_bits: int, mantissa_bits: int, kind: str) -> Tensor:
    codes = torch.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, (codes % 2**mantissa_bits).double() / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    normal = (1 + mantissa) * torch.exp2((exponent - bias).double())
    positive = torch.where(exponent > 0, normal, mantissa * 2.0 ** (1 - bias))
    finite = len(codes) - {"": 0, "fn": 1, "ieee": 2**mantissa_bits}[kind]
    positive[finite:] = positive[finite - 1]
    return torch.cat([positive, -positive]).float()
