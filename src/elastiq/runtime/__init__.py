"""Modules that run on packed bit planes."""

from .decoder import COMPILED, accelerate, expected_way, token_way
from .embedding import NestedEmbedding
from .experts import NestedExperts
from .interface import cache_argument, takes, with_cache
from .linear import NestedLinear, TiedHead
from .mixed import MixedMatrix
from .nested import NestedMatrix
from .stored import StoredMatrix, readable_widths
from .swap import bits_per_weight, bytes_in_memory, keep_a_parameter, nested_matrices, rearrange, swap
from .turns import changing_widths, take_turns

__all__ = [
    "COMPILED",
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
    "cache_argument",
    "changing_widths",
    "expected_way",
    "keep_a_parameter",
    "nested_matrices",
    "readable_widths",
    "rearrange",
    "swap",
    "take_turns",
    "takes",
    "token_way",
    "with_cache",
]
