"""Which level every matrix gets."""

from .equal_loss import EqualLoss
from .evolutionary import Evolutionary
from .integer_programme import IntegerProgramme
from .lagrangian import Lagrangian
from .marginal_gain import MarginalGain
from .random_search import RandomSearch

__all__ = ["EqualLoss", "Evolutionary", "IntegerProgramme", "Lagrangian", "MarginalGain", "RandomSearch"]
