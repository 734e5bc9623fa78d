"""Numbers of other libraries as Python's own."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from torch import Tensor

from .error import ElastiqError


def plain_number(value: Any, name: str) -> Any:
    """`value` with a number of another library as Python's own: numpy.int64(4) and 4.0 become 4, numpy.float32(2.5)
    becomes 2.5, and so does a tensor that holds one of them. What is no number comes back as it is.

    name: what the number stands for. Raises ElastiqError for a truth value, which Python takes for 0 or 1.
    """
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_):
        raise ElastiqError(f"{name}={value} is a truth value; give a number")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def plain_count(value: Any, name: str) -> Any:
    """`plain_number` for what is counted: a fraction is refused too. None comes back as it is."""
    count = plain_number(value, name)
    if isinstance(count, float):
        raise ElastiqError(f"{name}={count:g} is a fraction; give a whole number")
    return count
