"""How much of a block's output its input tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class CanonicalCorrelation(Sensitivity, name="correlation"):
    """1 - mean canonical correlation between a block's input and output (CPTQuant, 2412.03599, CMPQ), times the
    relative output error: what a straight line cannot say of the block needs bits.

    directions: both ends are reduced to so many principal directions first, fewer than there are tokens by far.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "blocks"})

    directions: int = 32

    def measure(self, matrix: Evidence) -> dict[int, float]:
        score = 1.0
        if matrix.block_input is not None and matrix.block_output is not None:
            a, b = self._basis(matrix.block_input), self._basis(matrix.block_output)
            score = 1.0 - float(torch.linalg.svdvals(a.T @ b).clamp(max=1.0).mean())
        return non_increasing({level: score * matrix.error(level) for level in matrix.levels})

    def _basis(self, x: Tensor) -> Tensor:
        """[tokens, directions] orthonormal columns that span the principal directions of x [tokens, hidden]."""
        centred = x.double() - x.double().mean(dim=0)
        count = min(self.directions, x.shape[1], max(1, len(x) // 4))
        return torch.linalg.svd(centred, full_matrices=False)[0][:, :count]
