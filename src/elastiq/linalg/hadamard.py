"""Walsh-Hadamard matrices times small ones, by compiled loops where they can."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import ElastiqError
from . import native

LANES = 16
"""Floats that compiled code works on at once."""
_PART = 64
"""Largest Walsh-Hadamard matrix that plain torch multiplies by."""


def mix(x: Tensor, factors: Tensor, rest: Tensor) -> Tensor:
    """(H ⊗ R)(factors * x) of rows x [..., in], in their dtype; gradients pass to x.

    factors: float32 [in]. rest: R, symmetric, float32 [size, size]. H: the Walsh-Hadamard matrix of ones and minus
    ones, of size in / len(R), a power of two. Raises ElastiqError if these do not fit rows of this length.
    """
    if factors.shape != x.shape[-1:] or not rest.numel() or x.shape[-1] % len(rest):
        raise ElastiqError(f"a rotation of {len(factors)} channels was given {x.shape[-1]}")
    seen = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if seen or type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32 or native.current() == "torch":
        with torch.autocast(x.device.type, enabled=False):  # which would take float32 rows in half precision
            return _mix((x * factors).to(x.dtype), rest.to(x.dtype))
    y: Tensor = _Mix.apply(x, factors, rest)
    return y


def description(factors: Tensor, rest: Tensor) -> tuple[tuple[int, int, int], tuple[Tensor, Tensor]]:
    """A map as compiled code is told it, by addresses within the two tensors."""
    arrays = factors.contiguous(), F.pad(rest, (0, -len(rest) % LANES)).contiguous()
    return (arrays[0].data_ptr(), arrays[1].data_ptr(), len(rest)), arrays


@cache
def walsh(size: int) -> Tensor:
    """[size, size] of Sylvester's construction, not normalised."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, rest: Tensor) -> Tensor:
        ctx.save_for_backward(factors, rest)
        return _compiled(x, factors, rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        factors, rest = ctx.saved_tensors
        return mix(grads[0], torch.ones_like(factors), rest) * factors, None, None


def _compiled(x: Tensor, factors: Tensor, rest: Tensor) -> Tensor:
    x, size = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    described, _kept = description(factors, rest)
    native.module.mix(  # type: ignore[union-attr]
        native.current(), described, x.data_ptr(), x.numel() // size, size, y.data_ptr(), torch.get_num_threads()
    )
    return y


def _mix(x: Tensor, rest: Tensor) -> Tensor:
    """(H ⊗ R) x; H as the product of smaller ones, a matrix product each."""
    left = x.shape[-1] // len(rest)
    out = (x.unflatten(-1, (left, len(rest))) @ rest).transpose(-1, -2)
    while left > 1:
        part = min(left, _PART)
        out = (out.unflatten(-1, (-1, part)) @ walsh(part).to(out)).transpose(-1, -2).flatten(-2)
        left //= part
    return out.transpose(-1, -2).flatten(-2)
