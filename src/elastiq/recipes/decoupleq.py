"""Recipe `decoupleq`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import DecoupleQ
from ..token_weights import BLOCK_OUTPUT


def decoupleq(
    levels: tuple[int, ...] = (2,),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """decoupleQ: integer part and floating part in turn.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer(tuple(levels), group_size, symmetric), DecoupleQ(), token_weights=token_weights, **recipe)
