"""The types that travel between all parts."""

from .error import ElastiqError
from .grid import MAX_BITS, MIN_SCALE, Grid, derive, to_half
from .recipe import Recipe
from .site import Site
from .stats import Stats
from .step import Format, Solver, Step, step_from_dict
from .term import Codes, QuantizedWeight, Term

__all__ = [
    "MAX_BITS",
    "MIN_SCALE",
    "Codes",
    "ElastiqError",
    "Format",
    "Grid",
    "QuantizedWeight",
    "Recipe",
    "Site",
    "Solver",
    "Stats",
    "Step",
    "Term",
    "derive",
    "step_from_dict",
    "to_half",
]
