"""A level for every matrix, or for its rows or experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from .error import ElastiqError
from .grid import MAX_BITS
from .plain import plain_number

Width = int | str
"""How a matrix is read: at one width, or every output row (of a fused tensor: every expert) at its own, as a string
with a digit for each (`33338333`)."""


def width_counts(width: Width, members: int) -> dict[int, int]:
    """How many of a matrix's rows or experts, `members` in all, are read at each width, ascending."""
    if isinstance(width, int):
        return {width: members}
    return {int(digit): width.count(digit) for digit in sorted(set(width))}


def widest(width: Width) -> int:
    """The width of the rows or experts that are read at the most bits."""
    return width if isinstance(width, int) else int(max(width))


@dataclass(frozen=True)
class LevelMap:
    """Matrix name -> width at which it is read.

    facts: JSON-ready, where the map comes from and what was predicted for it; nothing is computed from it.
    """

    widths: Mapping[str, Width]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths:
            raise ElastiqError("level map: it names no matrix")
        widths = {name: plain_number(width, f"level map: {name}") for name, width in self.widths.items()}
        for name, width in widths.items():
            if not isinstance(name, str) or not _is_width(width):
                shown = repr(width)[:60]
                raise ElastiqError(f"level map: {name!r} has the width {shown}, which is none from 1 to {MAX_BITS}")
        object.__setattr__(self, "widths", MappingProxyType(widths))
        object.__setattr__(self, "facts", MappingProxyType(dict(self.facts)))

    @property
    def uniform(self) -> int | None:
        """The width that everything is read at, None where there are several."""
        found = {bits for width in self.widths.values() for bits in width_counts(width, 1)}
        return found.pop() if len(found) == 1 else None

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that stand for the widths."""
        return sha256(json.dumps(dict(self.widths), sort_keys=True).encode()).hexdigest()[:8]


def _is_width(width: object) -> bool:
    if isinstance(width, str):
        return bool(width) and set(width) <= set(map(str, range(1, MAX_BITS + 1)))
    return type(width) is int and 1 <= width <= MAX_BITS
