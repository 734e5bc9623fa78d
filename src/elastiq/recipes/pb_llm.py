"""Recipe `pb-llm`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..splits import Salient
from ..token_weights import BLOCK_OUTPUT


def pb_llm(
    group_size: int = 64, share: float = 0.1, token_weights: TokenWeights | None = BLOCK_OUTPUT, **recipe: Any
) -> Recipe:
    """GPTQ with binary weights, the salient `share` of them in 8 bits: the paper's post-training variant.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Integer((1,), group_size, True), GPTQ(), splits=(Salient(share),), token_weights=token_weights, **recipe
    )
