"""Recipe `llm-int8`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import Minifloat
from ..solvers import RoundToNearest
from ..splits import OutlierFeatures
from ..token_weights import BLOCK_OUTPUT


def llm_int8(threshold: float = 6.0, token_weights: TokenWeights | None = BLOCK_OUTPUT, **recipe: Any) -> Recipe:
    """Rows of int8 with outlier features in 16 bits.

    recipe: as in `Recipe`.
    """
    return Recipe(
        Minifloat("int8", clip=False),
        RoundToNearest(),
        splits=(OutlierFeatures(threshold),),
        token_weights=token_weights,
        **recipe,
    )
