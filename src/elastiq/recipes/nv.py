"""Recipe `nv`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import BlockScaled
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT


def nv(number: str = "e2m1", token_weights: TokenWeights | None = BLOCK_OUTPUT, **recipe: Any) -> Recipe:
    """Blocks of 16 under FP8 scales: NVFP4 (`e2m1`), NVINT4 (`int4`).

    recipe: as in `Recipe`.
    """
    return Recipe(BlockScaled(number, 16, "e4m3"), RoundToNearest(), token_weights=token_weights, **recipe)
