"""Which code every weight gets."""

from .bitstack import BitStack
from .decoupleq import DecoupleQ
from .gptq import GPTQ
from .hqq import HQQ
from .nested import Nested
from .rtn import RoundToNearest

__all__ = ["GPTQ", "HQQ", "BitStack", "DecoupleQ", "Nested", "RoundToNearest"]
