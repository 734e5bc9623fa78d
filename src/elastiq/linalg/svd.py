"""Leading singular triplets."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .threads import in_chunks


def leading_triplets(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(left [rows, rank], values [rank], right [rank, columns]) of `matrix`, the largest values first; fewer than
    `rank` where the smaller side is. The same bits with any number of threads."""
    left, values, right = in_chunks(partial(torch.linalg.svd, full_matrices=False), [matrix])[0]
    return left[:, :rank], values[:rank], right[:rank]
