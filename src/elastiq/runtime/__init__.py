"""Modules that run on packed bit planes."""

from .decoder import accelerate
from .embedding import NestedEmbedding
from .experts import NestedExperts
from .linear import NestedLinear, TiedHead
from .mixed import MixedMatrix
from .nested import NestedMatrix
from .stored import StoredMatrix, readable_widths
from .swap import bits_per_weight, bytes_in_memory, keep_a_parameter, nested_matrices, rearrange, swap

__all__ = [
    "MixedMatrix",
    "NestedEmbedding",
    "NestedExperts",
    "NestedLinear",
    "NestedMatrix",
    "StoredMatrix",
    "TiedHead",
    "accelerate",
    "bits_per_weight",
    "bytes_in_memory",
    "keep_a_parameter",
    "nested_matrices",
    "readable_widths",
    "rearrange",
    "swap",
]
