"""What 16-bit floats hold of other numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .error import ElastiqError

HALF_LIMIT = 65504.0
"""Largest half-precision number."""
_HALF_LEAST = 2.0**-16
"""Numbers below are held better by bfloat16: half precision rounds them by more than 2^-9 of their size."""
_HALF_LOST = 2.0**-20
"""Half precision rounds numbers below by more than 2^-5 of their size."""


def held(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as `dtype`, but as bfloat16 where that is float16 and does not hold it: a number is too large, or all
    numbers of a row are so small that bfloat16 is nearer to them."""
    if dtype != torch.float16 or tensor.dtype == torch.float16 or not tensor.numel():
        return tensor.to(dtype)
    rows = tensor.abs().amax(-1) if tensor.dim() else tensor.abs()
    holds = bool(((rows <= HALF_LIMIT) & ((rows == 0) | (rows >= _HALF_LEAST))).all())
    return tensor.to(torch.float16 if holds else torch.bfloat16)


def require_held(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise ElastiqError if numbers of the tensor called `name` are too large to compute in `dtype`, or all of them so
    small that little is left of them there."""
    if dtype != torch.float16 or tensor.dtype == torch.float16 or not tensor.numel():
        return
    largest = float(tensor.abs().max())
    if largest and not _HALF_LOST <= largest <= HALF_LIMIT:
        raise ElastiqError(
            f"{name}: its largest number, {largest:.3g}, is none that float16 can hold; compute in bfloat16 or float32"
        )
