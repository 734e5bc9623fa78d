"""How much a map may take, in any unit, several at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

from ..core import ElastiqError, plain_number
from .table import Floats, Table

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Budget:
    """Upper limits; None is no limit.

    bits: mean code width over the quantized weights. bits_per_weight: counted over the same weights, scales and zero
    points of the active level included. size: bytes in memory, everything included. latency: seconds per token.
    """

    bits: float | None = None
    bits_per_weight: float | None = None
    size: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for unit, value in self.given.items():
            object.__setattr__(self, unit, plain_number(value, f"budget: {unit}"))
        for unit, value in self.given.items():
            if not math.isfinite(value) or value <= 0:
                raise ElastiqError(f"budget: {unit}={value} is not a positive number")

    @property
    def given(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def limits(self, table: Table) -> dict[str, float]:
        """Limit of every set unit as the sum of the table's costs that it allows: bits, bytes or seconds."""
        totals = {"bits": table.weights, "bits_per_weight": table.weights}
        limits: dict[str, float] = {}
        for unit, value in self.given.items():
            if unit in totals:
                limits[unit] = float(math.floor(Fraction(str(value)) * totals[unit]))
            else:
                limits[unit] = value - (table.base_bytes if unit == "size" else table.base_seconds)
        return limits


def check_reachable(budget: Budget, table: Table, costs: Mapping[str, Floats]) -> None:
    """Raise ElastiqError if even the lowest level of every matrix exceeds a limit, naming the least possible."""
    limits = budget.limits(table)
    for unit, cost in costs.items():
        least = float(cost[:, 0].sum())
        if unit in limits and least > limits[unit]:
            raise ElastiqError(
                f"budget: {spoken(unit, budget.given[unit])} is less than the smallest map, which takes "
                f"{spoken(unit, _back(unit, least, table), up=True)} (every matrix at {table.levels[0]} bits)"
            )


def spoken(unit: str, value: float, up: bool = False) -> str:
    """A limit in words: `3.37 bits`, `1200000000 bytes`; rounded up where it is a least value."""
    if unit == "size":
        return f"{int(value)} bytes"
    if unit == "latency":
        return f"{(math.ceil(value * 1e6) / 1e3 if up else value * 1e3):g} ms"
    shown = math.ceil(Fraction(value) * 10000) / 10000 if up else value
    return f"{shown:g} {'bits' if unit == 'bits' else 'bits per weight'}"


def parse_bytes(text: str | int | float) -> int:
    """`1.2GB`, `900 MiB` or a number of bytes. Raises ElastiqError for anything else."""
    match = _NUMBER.fullmatch(str(plain_number(text, "size")))
    unit = match.group(2).upper() or "B" if match else ""
    if not match or unit not in _BYTES:
        raise ElastiqError(f"size {text!r} is not a size; write it as 900MB, 1.2GB or 1.1GiB")
    return math.floor(Fraction(match.group(1)) * _BYTES[unit])


def parse_seconds(text: str) -> float:
    """`35ms` or `0.035s`. Raises ElastiqError for anything else."""
    match = _NUMBER.fullmatch(text)
    if not match or match.group(2) not in _SECONDS:
        raise ElastiqError(f"latency {text!r} is not a time; write it as 35ms or 0.035s")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def _back(unit: str, cost: float, table: Table) -> float:
    """A sum of costs in the unit a limit is given in."""
    if unit == "size":
        return cost + table.base_bytes
    if unit == "latency":
        return cost + table.base_seconds
    return float(np.float64(cost) / table.weights)
