"""Layers of bitsandbytes in four bits: NF4 and FP4, with plain or doubly quantized scales."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import ElastiqError

KEY = "weight.absmax"
STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
SHORTS = ("weight", KEY, "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *STATES)

_MOST_STATE = 4096


def bitsandbytes_reader(settings: Mapping[str, Any]) -> Callable[[str, dict[str, Tensor]], Tensor]:
    """Raises ElastiqError for the 8-bit format, whose outliers are no weights."""
    if not (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        raise ElastiqError("bitsandbytes: only its four-bit formats are read; load_in_4bit is not set")
    return lambda layer, arrays: bitsandbytes_dense(arrays)


def bitsandbytes_dense(arrays: dict[str, Tensor]) -> Tensor:
    """Values float32 of the arrays of one layer, in the shape it had.

    Each byte of `weight` holds two codes, the first one high; `absmax` scales runs of `blocksize` values of
    `quant_map`. Doubly quantized, `absmax` are codes of a table of their own. Raises ValueError where sizes disagree.
    """
    stored = next(arrays[name] for name in STATES if name in arrays)
    if stored.numel() > _MOST_STATE:
        raise ValueError(f"{stored.numel()} bytes of settings")
    state = json.loads(bytes(stored.tolist()).decode())
    shape, size = state["shape"], state["blocksize"]
    packed = arrays["weight"].contiguous().view(torch.uint8).flatten()
    if not all(type(n) is int and n > 0 for n in (*shape, size)) or -(-math.prod(shape) // 2) != packed.numel():
        raise ValueError(f"shape {shape} in blocks of {size} for {packed.numel()} bytes")
    count = math.prod(shape)
    scale = arrays[KEY].flatten()
    if "nested_blocksize" in state:
        table, step = arrays["weight.nested_quant_map"].float(), arrays["weight.nested_absmax"].float()
        scale = table[scale.long()] * _spread(step, state["nested_blocksize"], scale.numel()) + state["nested_offset"]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:count]
    values = arrays["weight.quant_map"].float()[codes.long()] * _spread(scale.float(), size, count)
    return values.reshape(shape)


def _spread(scale: Tensor, size: int, count: int) -> Tensor:
    """The scale of each of `count` values in blocks of `size`."""
    if type(size) is not int or size < 1 or scale.numel() != -(-count // size):
        raise ValueError(f"{scale.numel()} scales for {count} values in blocks of {size}")
    return scale[torch.arange(count) // size]
