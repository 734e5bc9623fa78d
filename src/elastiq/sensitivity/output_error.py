"""What quantization itself measured: free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class OutputError(Sensitivity, name="output-error"):
    """Hessian-weighted output error, tr((W - Q) H (W - Q)ᵀ), as a part of the block's output.

    The level table holds it as a part of the matrix's own output; times the row's energy it is the squared move of the
    block's output, which adds over matrices and blocks. Checkpoints without energies count every matrix the same.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"errors"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        return non_increasing({level: matrix.error(level) * matrix.energy for level in matrix.levels})
