"""Damped Cholesky factors of the inverse Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ElastiqError


def damped(hessian: Tensor, damp: float) -> Tensor:
    """[in, in] with `damp` times the mean of the diagonal added to the diagonal.

    An input that calibration never moved has a zero row: damping alone decides there, so its weights are rounded to
    nearest instead of being lost. Where nothing was seen at all the result is the identity.
    """
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), device=hessian.device)
    return hessian + damp * mean * torch.eye(len(hessian), device=hessian.device)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U, float32, with inverse(H) = Uᵀ U; computed in double precision.

    Raises torch.linalg.LinAlgError if H is not positive definite.
    """
    lower = torch.linalg.cholesky(hessian.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


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
