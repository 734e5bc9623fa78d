"""Block-scaled formats as their definitions are read, one block at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def element(x: Array, kind: Any, top: float) -> Array:
    """x rounded to the nearest number of the type, ties to even, cut off at the largest; integers without a type."""
    x = np.clip(x, -top, top)
    return np.rint(x) if kind is None else x.astype(kind).astype(np.float32)


def mx(weight: Array, size: int, kind: Any, top: float) -> Array:
    """OCP MX v1.0, section 6.3: X = 2^(floor(log2(max |v|)) - emax), P_i = quantize(v_i / X), saturating."""
    emax = math.floor(math.log2(top))
    out = np.zeros_like(weight)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], size):
            block = weight[row, first : first + size]
            most = float(np.abs(block).max())
            exponent = max(math.floor(math.log2(most)) - emax, -127) if most else -127
            out[row, first : first + size] = np.ldexp(element(np.ldexp(block, -exponent), kind, top), exponent)
    return out


def nv(weight: Array, size: int, kind: Any, top: float) -> Array:
    """NVFP4: a float32 scale max|W| / (448 top) for the matrix, per block an E4M3 one of max|block| / top over it."""
    import ml_dtypes

    whole = np.float32(np.abs(weight).max() / top / 448)
    out = np.zeros_like(weight)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], size):
            block = weight[row, first : first + size]
            local = np.float32(np.abs(block).max() / top) / whole
            scale = np.float32(np.float32(local).astype(ml_dtypes.float8_e4m3fn)) * whole
            out[row, first : first + size] = 0 if scale == 0 else element(block / scale, kind, top) * scale
    return out


def split_clusters(x: Array, share: Array, edges: list[int]) -> list[int]:
    """Edges after every cluster of the sorted row `x` is cut where the weighted squares left are least."""

    def left(first: int, last: int) -> float:
        if last <= first:
            return 0.0
        part, weights = x[first:last].astype(np.float64), share[first:last].astype(np.float64)
        mean = (part * weights).sum() / weights.sum()
        return float((weights * (part - mean) ** 2).sum())

    found = [edges[0]]
    for first, last in pairwise(edges):
        if last - first < 2:
            found += [last, last]
        else:
            found += [min(range(first + 1, last), key=lambda cut: left(first, cut) + left(cut, last)), last]
    return found
