"""Recipe `nested-tuned-blocks`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe
from ..tuners import ScaleTuning
from .nested import nested


def nested_tuned_blocks(levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, **options: Any) -> Recipe:
    """`nested`, then the scales of each level trained block by block: for models that do not fit into memory.

    options: as in `nested`.
    """
    return replace(nested(levels, group_size, **options), block_tuner=ScaleTuning())
