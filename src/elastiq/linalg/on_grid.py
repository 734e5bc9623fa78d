"""GPTQ's error feedback on any grid that is fitted beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import CodeGrid


def solve_on_grid(
    weight: Tensor, upper: Tensor, grid: CodeGrid, order: Tensor | None = None, block_size: int = 128
) -> Tensor:
    """Codes uint8 [out, in] for `weight` [out, in], column after column (GPTQ, 2210.17323, algorithm 1).

    upper: Cholesky factor of the inverse Hessian, permuted by `order` [in] if given: the order of the visit.
    block_size: columns per lazy update; changes nothing but speed.
    """
    order = torch.arange(weight.shape[1]) if order is None else order
    rest, columns = weight[:, order].clone(), order.tolist()
    codes = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, len(columns), block_size):
        last = min(first + block_size, len(columns))
        errors = torch.zeros(len(weight), last - first, device=weight.device)
        for j in range(first, last):
            at, column = columns[j], rest[:, j : j + 1]
            code = grid.quantize(column, at)
            error = (column - grid.dequantize(code, grid.bits, at)) / upper[j, j]
            rest[:, j + 1 : last].addmm_(error, upper[j : j + 1, j + 1 : last], alpha=-1)
            codes[:, at : at + 1], errors[:, j - first : j - first + 1] = code, error
        rest[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return codes
