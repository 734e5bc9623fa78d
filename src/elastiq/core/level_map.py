"""A level for every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .error import ElastiqError
from .grid import MAX_BITS


@dataclass(frozen=True)
class LevelMap:
    """Matrix name -> width at which it is read.

    facts: JSON-ready, where the map comes from and what was predicted for it; nothing is computed from it.
    """

    widths: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.widths:
            raise ElastiqError("level map: it names no matrix")
        for name, width in self.widths.items():
            if not isinstance(name, str) or type(width) is not int or not 1 <= width <= MAX_BITS:
                raise ElastiqError(f"level map: {name!r} has the width {width!r}, which is none from 1 to {MAX_BITS}")
        object.__setattr__(self, "widths", MappingProxyType(dict(self.widths)))
        object.__setattr__(self, "facts", MappingProxyType(dict(self.facts)))
