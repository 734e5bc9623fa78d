"""Which numbers codes may stand for."""

from .block_scaled import BlockScaled
from .codebook import Codebook
from .integer import Integer
from .minifloat import Minifloat
from .normal_float import NormalFloat

__all__ = ["BlockScaled", "Codebook", "Integer", "Minifloat", "NormalFloat"]
