"""Plain functions on tensors and arrays."""

from .cholesky import inverse_factor
from .hull import climb, hull_steps, lagrangian_bound, prices
from .planes import pack_planes, unpack_planes

__all__ = ["climb", "hull_steps", "inverse_factor", "lagrangian_bound", "pack_planes", "prices", "unpack_planes"]
