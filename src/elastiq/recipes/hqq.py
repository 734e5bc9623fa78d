"""Recipe `hqq`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import HQQ


def hqq(levels: tuple[int, ...] = (4,), group_size: int = 64, *, symmetric: bool = False, **recipe: Any) -> Recipe:
    """HQQ: zero points that leave sparse errors, without data; lower levels read its top bits on refitted scales.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer(tuple(levels), group_size, symmetric), HQQ(), **recipe)
