"""Rounding and clipping of nested codes by signed gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .training import Descent, MovingTuner, SignDescent


@dataclass(frozen=True)
class SignRound(MovingTuner, name="sign-round"):
    """Moves codes to neighbouring cells, and scales and zero points with them, by the sign of the gradient.

    AutoRound (2309.05516), section 3, equations 3 to 5, with its rates; AdaRound (2004.10568), section 3, is the same
    question asked with a penalty instead of a sign. What differs: it starts from the solver's codes, which are
    AutoRound's if the solver rounds to nearest; on nested codes a cell is one of the lowest level, a weight that stays
    in its cell keeps its code for all levels, and the loss is the sum over the levels, each relative to what it was
    before; a wide level therefore holds back moves that help a narrow one. Scales take the place of the clipping range:
    both ends of a group's range move.

    A weight's longest way is about `steps * rate / 2` cells: a quarter with the defaults, where AutoRound's 200 steps
    reach a half (docs/tuning.md has both). AutoRound also feeds a block what the quantized blocks before it give, as
    `Recipe.inputs` does here. Parameters as in `MovingTuner`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of what is judged, in float32")
    descent: ClassVar[type[Descent]] = SignDescent

    scale_rate: float = 5e-3
