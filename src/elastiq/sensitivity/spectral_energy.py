"""Where the energy of a matrix lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class SpectralEnergy(Sensitivity, name="spectral-energy"):
    """Energy of the leading singular directions of the weight, each input channel scaled by its root mean square, times
    the relative output error (after BitsMoE, 2606.00079, which gives bits to directions of a basis shared by
    experts; here a matrix has one width, so its directions count together).

    share: part of the singular values that counts as leading.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "weight", "stats"})

    share: float = 0.1

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.weight is not None and matrix.stats is not None
        scale = matrix.stats.mean_diagonal(matrix.weight.shape[1]).to(matrix.weight).sqrt()
        scaled = matrix.weight * scale
        small = scaled @ scaled.T if scaled.shape[0] < scaled.shape[1] else scaled.T @ scaled
        energies = torch.linalg.eigvalsh(small.double()).clamp_min(0).flip(0)
        score = float(energies[: max(1, round(self.share * len(energies)))].sum())
        return non_increasing({level: score * matrix.error(level) for level in matrix.levels})
