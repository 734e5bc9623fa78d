"""Recipe `gptq`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Integer
from ..solvers import GPTQ
from ..token_weights import BLOCK_OUTPUT


def gptq(
    levels: tuple[int, ...] = (2, 3, 4, 6, 8),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    scales: str = "half",
    embeddings: bool = False,
    inputs: str = "full",
    token_weights: TokenWeights | None = BLOCK_OUTPUT,
    **solver: Any,
) -> Recipe:
    """GPTQ at the top level; lower levels read its top bits on refitted scales.

    solver: parameters of `GPTQ`. Everything else as in `Integer` and `Recipe`.
    """
    format = Integer(tuple(levels), group_size, symmetric, scales)
    return Recipe(format, GPTQ(**solver), embeddings, inputs, token_weights)
