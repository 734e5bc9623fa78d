"""Recipe `nested-tuned`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core import Recipe, Tuner
from ..tuners import ScaleTuning
from .nested import nested


def nested_tuned(
    levels: tuple[int, ...] = (2, 3, 4, 6, 8), group_size: int = 64, tuner: Tuner | None = None, **options: Any
) -> Recipe:
    """`nested`, then the scales and zero points of each level trained against the full model's answers.

    tuner: in the place of `ScaleTuning` with its defaults. options: as in `nested`.
    """
    return replace(nested(levels, group_size, **options), tuner=tuner or ScaleTuning())
