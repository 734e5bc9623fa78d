"""Recipe `nf4`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import NormalFloat
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT


def nf4(
    number: str = "nf4",
    group_size: int = 64,
    scales: str = "double",
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """QLoRA's NF4 (or FP4) with double-quantized scales.

    recipe: as in `Recipe`.
    """
    return Recipe(NormalFloat(number, group_size, scales), RoundToNearest(), token_weights=token_weights, **recipe)
