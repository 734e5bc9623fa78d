"""Recipe `rsq`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import GPTQ
from ..token_weights import AttentionConcentration
from ..transforms import RandomHadamard


def rsq(
    levels: tuple[int, ...] = (4,),
    group_size: int = 64,
    *,
    symmetric: bool = False,
    least: float = 0.005,
    **recipe: Any,
) -> Recipe:
    """RSQ: rotate, count tokens by the attention they get, then GPTQ.

    least: as in `AttentionConcentration`. recipe: as in `Recipe`.
    """
    return Recipe(
        Integer(tuple(levels), group_size, symmetric),
        GPTQ(),
        token_weights=AttentionConcentration(least),
        transforms=(RandomHadamard(),),
        **recipe,
    )
