"""Which code every weight gets."""

from .bitstack import BitStack
from .decoupleq import DecoupleQ
from .gptq import GPTQ
from .nested import Nested
from .rtn import RoundToNearest

__all__ = ["GPTQ", "BitStack", "DecoupleQ", "Nested", "RoundToNearest"]
