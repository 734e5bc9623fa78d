"""What cannot lose weights cannot lose bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class PruningSensitivity(Sensitivity, name="pruning"):
    """Relative move of the matrix's output when the smallest weights are set to zero (CPTQuant, 2412.03599, PMPQ, which
    measures accuracy after pruning a layer), times the relative output error.

    sparsity: share of the weights that is pruned.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "weight", "stats"})

    sparsity: float = 0.5

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.weight is not None and matrix.stats is not None
        input_energy = matrix.stats.mean_diagonal(matrix.weight.shape[1]).to(matrix.weight)
        size = matrix.weight.abs()
        threshold = size.flatten().kthvalue(max(1, int(self.sparsity * size.numel()))).values
        moved = torch.where(size <= threshold, matrix.weight, 0.0).square() @ input_energy
        score = float(moved.sum() / (matrix.weight.square() @ input_energy).sum().clamp_min(1e-30))
        return non_increasing({level: score * matrix.error(level) for level in matrix.levels})
