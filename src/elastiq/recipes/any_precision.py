"""Recipe `any-precision`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Codebook
from ..solvers import RoundToNearest


def any_precision(levels: tuple[int, ...] = (2, 3, 4), **recipe: Any) -> Recipe:
    """A codebook per row and level, nested by splitting clusters (Any-Precision LLM).

    recipe: as in `Recipe`.
    """
    return Recipe(Codebook(tuple(levels)), RoundToNearest(), **recipe)
