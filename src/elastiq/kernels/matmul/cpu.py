"""Compiled products on the bit planes (native/matmul.inl): one read of the planes per token or batch of tokens.

Activations are fixed point per group ("int16": two bytes, relative error about 5e-5; "int8": one byte) or floats.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import ElastiqError
from ...linalg import native
from .weight import TiledWeight

DIGITS = {"int16": 2, "int8": 1, "float": 0}
"""Bytes of a fixed-point activation by mode; 0 for floats."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_TOKENS = 32
"""Longest batch that is multiplied on the planes without tile registers; more tokens share one decoded matrix."""


def path_for(like: Tensor, dtype: torch.dtype) -> str | None:
    """The compiled path that takes tensors where `like` is, of this type; None if none does."""
    path = native.current() if like.is_cpu and dtype in DTYPES else "torch"
    return None if path == "torch" else path


def decode(path: str, weight: TiledWeight, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [out_features, in_features] in `dtype`, or [len(rows), in_features] of some rows, by a compiled path.

    Raises IndexError for rows that the matrix does not have.
    """
    count = weight.out_features
    if rows is not None:
        rows = rows.to(torch.int64).contiguous()
        count = len(rows)
    values = torch.empty(count, weight.in_features, dtype=dtype)
    if count == 0:
        return values
    native.module.decode(  # type: ignore[union-attr]
        path, weight.handle, 0 if rows is None else rows.data_ptr(), count, values.data_ptr(),
        DTYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return values


def matmul(
    path: str, x: Tensor, weight: TiledWeight, bias: Tensor | None = None, activations: str = "int16"
) -> Tensor:
    """x Wᵀ + bias [..., out_features] of x [..., in_features], in the dtype of x (float32, bfloat16 or float16).

    A token with an activation that is not finite gives NaN everywhere. Raises ElastiqError if an array does not fit.
    """
    digits, dtype, shape = DIGITS.get(activations), DTYPES.get(x.dtype), x.shape
    if digits is None:
        raise ElastiqError(f"matmul: activations are {', '.join(DIGITS)}, not {activations!r}")
    inputs = weight.in_features
    if shape[-1] != inputs or dtype is None:
        raise ElastiqError(
            f"matmul: x is {x.dtype} {list(shape)}; {inputs} inputs in 16- or 32-bit floats are needed"
        )
    tokens = x.numel() // inputs
    if not weight.whole_tiles or (tokens > MAX_TOKENS and (path != "amx" or digits == 0)):
        return _decoded(path, x, weight, bias)
    if bias is not None:
        bias = _fitting(bias, weight, x.dtype)
    x = x.contiguous()
    result = x.new_empty((*shape[:-1], weight.out_features))
    weight.handle.product(
        path, x.data_ptr(), dtype, tokens, result.data_ptr(), 0 if bias is None else bias.data_ptr(), digits,
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _decoded(path: str, x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    if not weight.whole_tiles:
        _say_decoded(weight.group_size)
    dense = decode(path, weight, dtype=x.dtype)
    return F.linear(x, dense, None if bias is None else _fitting(bias, weight, x.dtype))


def _fitting(bias: Tensor, weight: TiledWeight, dtype: torch.dtype) -> Tensor:
    if bias.numel() != weight.out_features:
        raise ElastiqError(f"matmul: a bias has {bias.numel()} numbers, the matrix {weight.out_features} rows")
    return bias.to(dtype).contiguous()


@cache
def _say_decoded(group_size: int) -> None:
    logging.getLogger("elastiq").warning(
        "groups of %d inputs do not fit tiles of 32: such matrices are decoded for every product, which is slower; "
        "use groups of 32, 64 or 128",
        group_size,
    )
