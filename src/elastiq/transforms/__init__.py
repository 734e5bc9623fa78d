"""Maps of a matrix's input after which codes do better."""

from .awq import ActivationAware
from .hadamard import RandomHadamard
from .smooth import SmoothQuant

__all__ = ["ActivationAware", "RandomHadamard", "SmoothQuant"]
