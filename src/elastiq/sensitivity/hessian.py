"""Curvature of the loss, one number per matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class HessianTrace(Sensitivity, name="hessian-trace"):
    """Mean Hessian eigenvalue times ||Q - W||² (HAWQ-V2, 1911.03852), the trace by Hutchinson's estimate
    with exact Hessian-vector products. A trace estimated below zero counts as zero."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "trace"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.trace is not None and matrix.weight is not None
        mean = max(matrix.trace, 0.0) / matrix.weight.numel()
        return non_increasing(
            {level: 0.5 * mean * float(matrix.change(level).square().sum()) for level in matrix.levels}
        )


@dataclass(frozen=True)
class HessianEigenvalue(Sensitivity, name="hessian-eigenvalue"):
    """Largest eigenvalue times ||Q - W||² (HAWQ, 1905.03696), of the Gauss-Newton part of the Hessian as the
    empirical Fisher gives it, by power iteration over a stream of gradients (as Oja 1982): two vectors in memory."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "eigenvalue"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.eigenvalue is not None
        return non_increasing(
            {level: 0.5 * matrix.eigenvalue * float(matrix.change(level).square().sum()) for level in matrix.levels}
        )
