"""Damped Cholesky factors of the inverse Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ElastiqError

COLUMNS = 512
"""Columns of a factor solved together; bounds the memory."""


def damped(hessian: Tensor, damp: float) -> Tensor:
    """[in, in] with `damp` times the mean of the diagonal added to the diagonal.

    An input that calibration never moved has a zero row: damping alone decides there, so its weights are rounded to
    nearest instead of being lost. Where nothing was seen at all the result is the identity.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), device=hessian.device)
    result = hessian.clone()
    result.diagonal().add_(damp * mean)
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U, float32, with inverse(H) = Uᵀ U; computed in double precision.

    With rows and columns in reverse, H = L Lᵀ; U is the inverse of L, turned back. It is solved a few columns at a
    time, so that only one matrix is held in double precision beside the one being factored.
    Raises torch.linalg.LinAlgError if H is not positive definite.
    """
    size = len(hessian)
    lower = torch.linalg.cholesky(hessian.flip(0, 1).double())
    upper = torch.zeros_like(hessian, dtype=torch.float32)
    for first in range(0, size, COLUMNS):
        count = min(COLUMNS, size - first)
        unit = torch.eye(size - first, count, dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower[first:, first:], unit, upper=False)
        upper[: size - first, size - first - count : size - first] = solved.flip(0, 1)
    return upper


def factor_with_retry(hessian: Tensor, damp: float, name: str) -> tuple[Tensor, Tensor, float]:
    """(damped Hessian, its inverse factor, damping used): tries ten times the damping until the factor exists.

    Raises ElastiqError naming the step if even damping by the mean itself does not help.
    """
    while True:
        try:
            matrix = damped(hessian, damp)
            return matrix, inverse_factor(matrix), damp
        except torch.linalg.LinAlgError:
            if damp >= 1:
                break
            damp = min(1.0, max(damp * 10, 1e-4))
    raise ElastiqError(f"{name}: the Hessian is not positive definite even with damp=1; check the calibration text")
