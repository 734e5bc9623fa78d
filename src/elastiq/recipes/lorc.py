"""Recipe `lorc`."""

from __future__ import annotations

from typing import Any

from ..compensators import LowRankError
from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..token_weights import BLOCK_OUTPUT


def lorc(
    levels: tuple[int, ...] = (2, 3, 4, 6, 8),
    group_size: int = 64,
    rank: int = 8,
    *,
    symmetric: bool = False,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """GPTQ, and the error of every level to a low rank in 16 bits.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        GPTQ(),
        compensators=(LowRankError(rank),),
        token_weights=token_weights,
        **recipe,
    )
