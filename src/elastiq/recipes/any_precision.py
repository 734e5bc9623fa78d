"""Recipe `any-precision`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Codebook
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT


def any_precision(
    levels: tuple[int, ...] = (2, 3, 4), token_weights: TokenWeights | None = BLOCK_OUTPUT, **recipe: Any
) -> Recipe:
    """A codebook per row and level, nested by splitting clusters (Any-Precision LLM).

    recipe: as in `Recipe`.
    """
    return Recipe(Codebook(tuple(levels)), RoundToNearest(), token_weights=token_weights, **recipe)
