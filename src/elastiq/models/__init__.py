"""Model directories: reading them, building the module tree without weights, finding what can be quantized."""

from .discover import Layout, discover
from .fused import fused_groups
from .generation import read_generation
from .residual_stream import residual_stream
from .scaled import is_eight_bit
from .skeleton import (
    NO_EDITS,
    build_skeleton,
    free_module,
    free_parameter,
    give_back_memory,
    load_module,
    read_parameter,
)
from .source import ModelSource, load_tokenizer

__all__ = [
    "NO_EDITS",
    "Layout",
    "ModelSource",
    "build_skeleton",
    "discover",
    "free_module",
    "free_parameter",
    "fused_groups",
    "give_back_memory",
    "is_eight_bit",
    "load_module",
    "load_tokenizer",
    "read_generation",
    "read_parameter",
    "residual_stream",
]
