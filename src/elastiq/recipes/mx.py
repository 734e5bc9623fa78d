"""Recipe `mx`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import BlockScaled
from ..solvers import RoundToNearest


def mx(number: str = "e2m1", **recipe: Any) -> Recipe:
    """OCP MX blocks of 32: MXFP4 (`e2m1`), MXFP6 (`e2m3`, `e3m2`), MXFP8 (`e4m3fn`, `e5m2ieee`), MXINT8 (`int8`) and
    MXINT4 (`int4`).

    recipe: as in `Recipe`.
    """
    return Recipe(BlockScaled(number), RoundToNearest(), **recipe)
