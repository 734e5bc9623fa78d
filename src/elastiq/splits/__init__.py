"""Which values are kept apart."""

from .llm_int8 import OutlierFeatures
from .pb_llm import Salient
from .spqr import SensitiveWeights

__all__ = ["OutlierFeatures", "Salient", "SensitiveWeights"]
