"""Recipe `quarot`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..token_weights import BLOCK_OUTPUT
from ..transforms import RandomHadamard


def quarot(
    levels: tuple[int, ...] = (4,),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **recipe: Any,
) -> Recipe:
    """GPTQ on weights behind a random Hadamard rotation.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        GPTQ(),
        transforms=(RandomHadamard(),),
        token_weights=token_weights,
        **recipe,
    )
