"""Recipe `fp8`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Minifloat
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT


def fp8(
    number: str = "e4m3fn",
    group_size: int = -1,
    scales: str = "half",
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """Floats of a sign, some exponent and some mantissa bits under one scale per row or group.

    number, group_size, scales: as in `Minifloat`; `e2m1`, `e2m3`, `e3m2` and `e5m2ieee` are the other usual ones.
    recipe: as in `Recipe`.
    """
    return Recipe(Minifloat(number, group_size, scales), RoundToNearest(), token_weights=token_weights, **recipe)
