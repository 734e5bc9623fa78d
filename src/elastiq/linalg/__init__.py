"""Plain functions on tensors and arrays."""

from .cholesky import inverse_factor
from .hull import climb, hull_steps, lagrangian_bound, prices
from .planes import pack_planes, unpack_planes
from .svd import leading_triplets
from .threads import in_chunks

__all__ = [
    "climb",
    "hull_steps",
    "in_chunks",
    "inverse_factor",
    "lagrangian_bound",
    "leading_triplets",
    "pack_planes",
    "prices",
    "unpack_planes",
]
