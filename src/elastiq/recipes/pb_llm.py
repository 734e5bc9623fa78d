"""Recipe `pb-llm`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import RoundToNearest
from ..splits import Salient


def pb_llm(group_size: int = 64, share: float = 0.1, **recipe: Any) -> Recipe:
    """Binary weights, the salient `share` of them in 8 bits.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer((1,), group_size, True), RoundToNearest(), splits=(Salient(share),), **recipe)
