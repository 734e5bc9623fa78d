"""The types that travel between all parts."""

from .allocation import (
    EVIDENCE,
    Allocator,
    Choices,
    Damage,
    Evidence,
    Problem,
    Sensitivity,
    Solution,
    non_increasing,
)
from .error import ElastiqError
from .grid import MAX_BITS, MIN_SCALE, Grid, derive, to_half
from .level_map import LevelMap, Width, widest, width_counts
from .recipe import Recipe
from .site import Site
from .stats import Stats
from .step import Format, Journal, Objective, Solver, Step, Tuned, Tuner, step_from_dict
from .term import Codes, QuantizedWeight, Term

__all__ = [
    "EVIDENCE",
    "MAX_BITS",
    "MIN_SCALE",
    "Allocator",
    "Choices",
    "Codes",
    "Damage",
    "ElastiqError",
    "Evidence",
    "Format",
    "Grid",
    "Journal",
    "LevelMap",
    "Objective",
    "Problem",
    "QuantizedWeight",
    "Recipe",
    "Sensitivity",
    "Site",
    "Solution",
    "Solver",
    "Stats",
    "Step",
    "Term",
    "Tuned",
    "Tuner",
    "Width",
    "derive",
    "non_increasing",
    "step_from_dict",
    "to_half",
    "widest",
    "width_counts",
]
