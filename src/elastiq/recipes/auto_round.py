"""Recipe `auto-round`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe
from ..tuners import SignRound
from .nested import nested
from .rtn import rtn


def auto_round(levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, **options: Any) -> Recipe:
    """Codes and scales of each block moved by the sign of gradients: of one level from `rtn`, as AutoRound does it, of
    several from `nested`.

    options: as in these.
    """
    start = rtn if len(levels) == 1 else nested
    return replace(start(levels, group_size, **options), block_tuner=SignRound())
