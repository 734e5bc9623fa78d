"""Recipe `gsq`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe
from ..tuners import GumbelChoice
from .nested import nested


def gsq(levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, **options: Any) -> Recipe:
    """`nested`, then codes of each block chosen among neighbours by Gumbel-softmax; with one level, close to GSQ.

    options: as in `nested`.
    """
    return replace(nested(levels, group_size, **options), block_tuner=GumbelChoice())
