"""Kinds of terms, grids and folds that formats, splits, solvers, compensators and transforms are made of."""

from .folds import Diagonal, Hadamard
from .sides import Channels, LowRank, Shift, Sparse
from .signs import SignStack
from .table import TableCodes, TableGrid
from .values import bits_of, values

__all__ = [
    "Channels",
    "Diagonal",
    "Hadamard",
    "LowRank",
    "Shift",
    "SignStack",
    "Sparse",
    "TableCodes",
    "TableGrid",
    "bits_of",
    "values",
]
