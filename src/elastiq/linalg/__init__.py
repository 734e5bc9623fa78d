"""Plain functions on tensors."""

from .cholesky import inverse_factor
from .planes import pack_planes, unpack_planes

__all__ = ["inverse_factor", "pack_planes", "unpack_planes"]
