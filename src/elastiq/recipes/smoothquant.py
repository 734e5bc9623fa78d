"""Recipe `smoothquant`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import RoundToNearest
from ..transforms import SmoothQuant


def smoothquant(
    levels: tuple[int, ...] = (8,), group_size: int = -1, *, symmetric: bool = True, **recipe: Any
) -> Recipe:
    """SmoothQuant: 8-bit rows of weights that took over a part of the activations' range.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric), RoundToNearest(), transforms=(SmoothQuant(),), **recipe
    )
