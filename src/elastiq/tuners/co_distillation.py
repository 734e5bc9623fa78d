"""All levels of nested codes trained end to end, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .training import Adam, Descent, MovingTuner


@dataclass(frozen=True)
class CoDistillation(MovingTuner, name="co-distillation"):
    """Trains codes and scales of all levels at once, every level against the full model and against the top level.

    MatQuant (2502.06786), section 3, equation 7 and its co-distillation: the loss is a sum over the levels that the
    same codes are read at, and the wide level teaches the narrow ones. What differs: every level has scales of its own,
    the loss of a level is a distance (relative to what it was before) and not the text's, and codes start from the
    solver's: a weight keeps its code until it has moved to another cell of the lowest level.

    By Adam. Parameters as in `MovingTuner`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of the whole model, four times in float32")
    descent: ClassVar[type[Descent]] = Adam
    taught: ClassVar[bool] = True

    steps: int = 40
    batch: int = 1
    scale_rate: float = 2e-3
