"""Which code every weight gets."""

from .gptq import GPTQ
from .nested import Nested
from .rtn import RoundToNearest

__all__ = ["GPTQ", "Nested", "RoundToNearest"]
