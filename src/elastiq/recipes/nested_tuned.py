"""Recipe `nested-tuned`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe, Tuner
from ..tuners import ScaleTuning
from .nested import nested

LEVEL_WEIGHTS = {1: 1.5, 2: 1.0, 3: 2.0, 4: 5.0, 5: 10.0, 6: 20.0, 7: 35.0, 8: 60.0}
"""More for wide levels than `Nested` gives them: tuning wins back what that costs narrow ones (docs/tuning.md)."""


def nested_tuned(
    levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, tuner: Tuner | None = None, **options: Any
) -> Recipe:
    """`nested` with `LEVEL_WEIGHTS`, then scales and zero points of the levels up to 4 bits trained against the full
    model's answers.

    tuner: in the place of `ScaleTuning` with its defaults. options: as in `nested`.
    """
    weights = tuple(LEVEL_WEIGHTS.get(level, 1.0) for level in levels)  # a level out of range is refused by the format
    recipe = nested(levels, group_size, **{"weights": weights, **options})
    return replace(recipe, tuner=tuner or ScaleTuning())
