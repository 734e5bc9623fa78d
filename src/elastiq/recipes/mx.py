"""Recipe `mx`."""

from __future__ import annotations

from typing import Any

from ..core import Recipe, TokenWeights
from ..formats import BlockScaled
from ..solvers import RoundToNearest
from ..token_weights import BLOCK_OUTPUT


def mx(
    number: str = "e2m1", round_up: bool | None = None, token_weights: TokenWeights | None = BLOCK_OUTPUT, **recipe: Any
) -> Recipe:
    """OCP MX blocks of 32: MXFP4 (`e2m1`), MXFP6 (`e2m3`, `e3m2`), MXFP8 (`e4m3fn`, `e5m2ieee`), MXINT8 (`int8`) and
    MXINT4 (`int4`).

    round_up: as in `BlockScaled`; by default of MXINT4 alone, which OCP MX does not define. recipe: as in `Recipe`.
    """
    format = BlockScaled(number, round_up=number == "int4" if round_up is None else round_up)
    return Recipe(format, RoundToNearest(), token_weights=token_weights, **recipe)
