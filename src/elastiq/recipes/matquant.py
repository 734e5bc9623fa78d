"""Recipe `matquant`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe
from ..tuners import CoDistillation
from .nested import nested


def matquant(levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, **options: Any) -> Recipe:
    """`nested`, then codes and scales of all levels trained end to end, together.

    options: as in `nested`.
    """
    return replace(nested(levels, group_size, **options), tuner=CoDistillation())
