"""Recipe `bias`."""

from __future__ import annotations

from typing import Any

from ..compensators import BiasCorrection
from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..token_weights import BLOCK_OUTPUT


def bias(
    levels: tuple[int, ...] = (2, 3, 4, 6, 8),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """GPTQ, and the mean error of every level's outputs given back.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        GPTQ(),
        compensators=(BiasCorrection(),),
        token_weights=token_weights,
        **recipe,
    )
