"""Recipe `smoothquant`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT
from ..transforms import SmoothQuant


def smoothquant(
    levels: tuple[int, ...] = (8,),
    group_size: int = -1,
    *,
    symmetric: bool = True,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """SmoothQuant: 8-bit rows of weights that took over a part of the activations' range.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        RoundToNearest(),
        transforms=(SmoothQuant(),),
        token_weights=token_weights,
        **recipe,
    )
