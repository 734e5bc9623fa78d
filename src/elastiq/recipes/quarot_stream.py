"""Recipe `quarot-stream`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..rewrites import ResidualRotation
from ..solvers import GPTQ
from ..token_weights import BLOCK_OUTPUT


def quarot_stream(
    levels: tuple[int, ...] = (4,),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    heads: bool = True,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """GPTQ on a model whose residual stream, and values, are rotated in the weights: running costs nothing more.

    heads: as in `ResidualRotation`. recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        GPTQ(),
        token_weights=token_weights,
        rewrites=(ResidualRotation(heads),),
        **recipe,
    )
