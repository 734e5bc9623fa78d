"""A checkpoint as a model that answers: loaded at any width, switched while it runs, continued token by token."""

from .generation import generate
from .loading import Widths, attach, bits_per_weight, bytes_in_memory, load, map_widths, set_bits, untie_stored

__all__ = [
    "Widths",
    "attach",
    "bits_per_weight",
    "bytes_in_memory",
    "generate",
    "load",
    "map_widths",
    "set_bits",
    "untie_stored",
]
