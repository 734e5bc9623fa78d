"""What is added to make up for what the codes lose."""

from .bias import BiasCorrection
from .low_rank import LowRankError

__all__ = ["BiasCorrection", "LowRankError"]
