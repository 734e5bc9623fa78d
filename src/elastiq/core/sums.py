"""Sums that do not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 4096
"""Values added in one go: far below the 32768 from which torch shares one sum among threads."""


def total(values: Tensor) -> float:
    """The sum of all values, in double precision.

    Where torch makes one number of many values, every thread adds up a part, so that the last digits depend on how
    many threads there are. Here the parts are blocks of a fixed length.
    """
    flat = values.flatten()
    blocks = flat[: len(flat) - len(flat) % _BLOCK].view(-1, _BLOCK)
    rest = flat[len(flat) - len(flat) % _BLOCK :]
    return float(sum([*blocks.sum(dim=1, dtype=torch.float64).tolist(), *rest.double().tolist()]))


def mean(values: Tensor) -> float:
    """The mean of all values, one at least, as `total` adds them."""
    return total(values) / values.numel()
