"""Recipe `pb-llm`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import GPTQ
from ..splits import Salient


def pb_llm(group_size: int = 64, share: float = 0.1, **recipe: Any) -> Recipe:
    """GPTQ with binary weights, the salient `share` of them in 8 bits: the paper's post-training variant.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer((1,), group_size, True), GPTQ(), splits=(Salient(share),), **recipe)
