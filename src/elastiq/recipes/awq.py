"""Recipe `awq`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT
from ..transforms import ActivationAware


def awq(
    levels: tuple[int, ...] = (4,),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """AWQ: searched scales of input channels and searched clipping, then rounding to nearest.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        RoundToNearest(),
        transforms=(ActivationAware(),),
        token_weights=token_weights,
        **recipe,
    )
