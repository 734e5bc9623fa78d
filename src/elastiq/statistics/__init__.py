"""Sums over the rows that reach a matrix, one file each. One that a single step needs may as well stand beside it."""

from .abs_max import AbsMax
from .abs_mean import AbsMean
from .diagonal import HessianDiagonal
from .grad_sq import GradSq
from .hessian import Hessian
from .mean import Mean

__all__ = ["AbsMax", "AbsMean", "GradSq", "Hessian", "HessianDiagonal", "Mean"]
