"""Recipe `bitstack`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import BitStack
from ..token_weights import BLOCK_OUTPUT


def bitstack(
    levels: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
    rank: int = 16,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """BitStack: signs with magnitudes of a low rank, block upon block; a level reads as many blocks.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer(tuple(levels), -1), BitStack(rank), token_weights=token_weights, **recipe)
