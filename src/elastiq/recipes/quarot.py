"""Recipe `quarot`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe
from ..formats import Integer
from ..solvers import GPTQ
from ..transforms import RandomHadamard


def quarot(
    levels: tuple[int, ...] = (4,), group_size: int = 64, *, symmetric: bool = False, **recipe: Any
) -> Recipe:
    """GPTQ on weights behind a random Hadamard rotation.

    recipe: as in `Recipe`.
    """
    return Recipe(Integer(tuple(levels), group_size, symmetric), GPTQ(), transforms=(RandomHadamard(),), **recipe)
