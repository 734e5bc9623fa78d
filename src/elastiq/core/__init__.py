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
from .edit import Edit, Edits, Heads, Norm, ResidualStream
from .error import ElastiqError, first_line, library_errors
from .fold import Fold, fold_in, fold_out
from .grid import MAX_BITS, CodeGrid, Codes, Grid, derive
from .half import held, require_held
from .level_map import LevelMap, Width, widest, width_counts
from .part import Kept, Part, is_read
from .plain import plain_count, plain_number
from .powers import LEAST, RowPowers, common_power
from .recipe import Recipe
from .scales import MIN_SCALE, ArraySpec, decode_level, encode_level, level_specs, rounded, storage, to_half
from .site import FUSED, ROLES, TRANSPOSED, Site
from .stats import Rows, Statistic, Stats
from .step import (
    Compensator,
    Format,
    Journal,
    Objective,
    Rewrite,
    Seen,
    Solver,
    Split,
    Step,
    TokenWeights,
    Transform,
    Tuned,
    Tuner,
    step_from_dict,
)
from .sums import mean, total
from .term import QuantizedWeight, SideTerm, Term

__all__ = [
    "EVIDENCE",
    "FUSED",
    "LEAST",
    "MAX_BITS",
    "MIN_SCALE",
    "ROLES",
    "TRANSPOSED",
    "Allocator",
    "ArraySpec",
    "Choices",
    "CodeGrid",
    "Codes",
    "Compensator",
    "Damage",
    "Edit",
    "Edits",
    "ElastiqError",
    "Evidence",
    "Fold",
    "Format",
    "Grid",
    "Heads",
    "Journal",
    "Kept",
    "LevelMap",
    "Norm",
    "Objective",
    "Part",
    "Problem",
    "QuantizedWeight",
    "Recipe",
    "ResidualStream",
    "Rewrite",
    "RowPowers",
    "Rows",
    "Seen",
    "Sensitivity",
    "SideTerm",
    "Site",
    "Solution",
    "Solver",
    "Split",
    "Statistic",
    "Stats",
    "Step",
    "Term",
    "TokenWeights",
    "Transform",
    "Tuned",
    "Tuner",
    "Width",
    "common_power",
    "decode_level",
    "derive",
    "encode_level",
    "first_line",
    "fold_in",
    "fold_out",
    "held",
    "is_read",
    "level_specs",
    "library_errors",
    "mean",
    "non_increasing",
    "plain_count",
    "plain_number",
    "require_held",
    "rounded",
    "step_from_dict",
    "storage",
    "to_half",
    "total",
    "widest",
    "width_counts",
]
