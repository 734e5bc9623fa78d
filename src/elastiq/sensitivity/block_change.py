"""How much a block changes what passes through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class BlockChange(Sensitivity, name="block-change"):
    """1 - cosine between a block's input and output, mean over the tokens (layer input modification, LIM, of
    Layer-Wise-Quantization, 2406.17415), times the relative output error. The paper ranks whole blocks; matrices
    outside the blocks count as one that changes everything."""

    needs: ClassVar[frozenset[str]] = frozenset({"errors", "blocks"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        score = 1.0
        if matrix.block_input is not None and matrix.block_output is not None:
            cosine = torch.nn.functional.cosine_similarity(matrix.block_input, matrix.block_output, dim=-1)
            score = 1.0 - float(cosine.mean())
        return non_increasing({level: score * matrix.error(level) for level in matrix.levels})
