"""From a budget to a level map, without reading a weight."""

from .allocation import Allocation, allocate
from .budget import Budget, parse_bytes, parse_seconds
from .frontier import Frontier, Step, frontier
from .losses import DEFAULT_ALLOCATOR, Measurement, Stored, read_stored, write_stored
from .map_file import complete, read_map, write_map
from .table import Table

__all__ = [
    "DEFAULT_ALLOCATOR",
    "Allocation",
    "Budget",
    "Frontier",
    "Measurement",
    "Step",
    "Stored",
    "Table",
    "allocate",
    "complete",
    "frontier",
    "parse_bytes",
    "parse_seconds",
    "read_map",
    "read_stored",
    "write_map",
    "write_stored",
]
