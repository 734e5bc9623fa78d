"""Recipe `llm-int8`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Minifloat
from ..solvers import RoundToNearest
from ..splits import OutlierFeatures


def llm_int8(threshold: float = 6.0, **recipe: Any) -> Recipe:
    """Rows of int8 with outlier features in 16 bits.

    recipe: as in `Recipe`.
    """
    return Recipe(Minifloat("int8", clip=False), RoundToNearest(), splits=(OutlierFeatures(threshold),), **recipe)
