"""Damped Cholesky factors of the inverse Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import ElastiqError, mean
from .threads import in_chunks

COLUMNS = 512
"""Columns of a factor solved together; bounds the memory."""


def damped(hessian: Tensor, damp: float) -> Tensor:
    """[in, in] with `damp` times the mean of the diagonal added to the diagonal.

    An input that calibration never moved has a zero row: damping alone decides there, so its weights are rounded to
    nearest instead of being lost. Where nothing was seen at all the result is the identity.
    """
    level = mean(hessian.diagonal())
    if not level > 0:
        return torch.eye(len(hessian), device=hessian.device)
    result = hessian.clone()
    result.diagonal().add_(damp * level)
    return result


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U, float32, with inverse(H) = Uᵀ U; computed in double precision.

    With rows and columns in reverse, H = L Lᵀ; U is the inverse of L, turned back. It is solved a few columns at a
    time, so that one matrix is held in double precision. The same bits with any number of threads.
    Raises torch.linalg.LinAlgError if H is not positive definite.
    """
    size = len(hessian)
    lower = hessian.flip(0, 1).double()
    _factor(lower)
    upper = torch.zeros_like(hessian, dtype=torch.float32)

    def invert(first: int) -> None:
        count = min(COLUMNS, size - first)
        unit = torch.eye(size - first, count, dtype=lower.dtype, device=lower.device)
        solved = torch.linalg.solve_triangular(lower[first:, first:], unit, upper=False)
        upper[: size - first, size - first - count : size - first] = solved.flip(0, 1)

    in_chunks(invert, range(0, size, COLUMNS))
    return upper


def _factor(matrix: Tensor) -> None:
    """Put the Cholesky factor L of `matrix` (double, symmetric) in its place, on and below the diagonal.

    Panels of COLUMNS columns from left to right: what the finished columns explain is taken off, the tile on the
    diagonal is factored, and the rows below it, COLUMNS at a time, are solved for. L Lᵀ is `matrix` in each tile.
    """
    size = len(matrix)
    for first in range(0, size, COLUMNS):
        panel = slice(first, min(first + COLUMNS, size))
        done = matrix[panel, :first]

        def diagonal(rows: slice, done: Tensor = done) -> Tensor:
            return torch.linalg.cholesky(matrix[rows, rows] - done @ done.T)

        matrix[panel, panel] = tile = in_chunks(diagonal, [panel])[0]

        def below(start: int, panel: slice = panel, done: Tensor = done, tile: Tensor = tile) -> None:
            rows = slice(start, min(start + COLUMNS, size))
            left = matrix[rows, panel] - matrix[rows, : panel.start] @ done.T
            matrix[rows, panel] = torch.linalg.solve_triangular(tile.T, left, upper=True, left=False)

        if panel.stop < size:
            in_chunks(below, range(panel.stop, size, COLUMNS))


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
