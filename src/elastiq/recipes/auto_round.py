"""Recipe `auto-round`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe
from ..tuners import SignRound
from .nested import nested


def auto_round(levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, **options: Any) -> Recipe:
    """`nested`, then codes and scales of each block moved by the sign of gradients; with one level, AutoRound.

    options: as in `nested`.
    """
    return replace(nested(levels, group_size, **options), block_tuner=SignRound())
