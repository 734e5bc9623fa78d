"""Curvature from labels that the model draws itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class SampledFisher(Sensitivity, name="sampled-fisher"):
    """1/2 E (gᵀ (Q - W))², g the gradient for labels drawn from the model's own predictions: the KL divergence to
    second order, all weights of the matrix together (Fisher's information; Kunstner, 1905.12558, on why not with the
    labels of the text).

    Like `kl` nats per token, for a number of backward passes that does not grow with the matrices and levels. Its rows
    share by the diagonal, 1/2 E g² (Q - W)², which is less noisy.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "slopes"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.slopes is not None
        return non_increasing({level: 0.5 * float(matrix.slopes[level].square().mean()) for level in matrix.levels})

    def rows(self, matrix: Evidence) -> Tensor | None:
        assert matrix.drawn is not None
        return torch.stack(
            [0.5 * (matrix.drawn * matrix.change(level).square()).sum(dim=1) for level in matrix.levels]
        )
