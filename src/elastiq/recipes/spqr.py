"""Recipe `spqr`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..splits import SensitiveWeights
from ..token_weights import BLOCK_OUTPUT


def spqr(
    levels: tuple[int, ...] = (3,),
    group_size: int = 64,
    share: float = 0.01,
    *,
    symmetric: bool = False,
    scales: str = "half",
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """GPTQ with the most sensitive weights sparse in 16 bits.

    share: of the weights. Everything else as in `Integer` and `Recipe`.
    """
    format = Integer(tuple(levels), group_size, symmetric, scales)
    return Recipe(format, GPTQ(), splits=(SensitiveWeights(share),), token_weights=token_weights, **recipe)
