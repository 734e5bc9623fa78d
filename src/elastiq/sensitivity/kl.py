"""The reference that all others are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class EndToEndKL(Sensitivity, name="kl"):
    """KL divergence, nats per token, of the model's predictions when this matrix alone (with those that share its
    level) is read at a level and everything else at the widest. One pass over the text per group and level."""

    needs: ClassVar[frozenset[str]] = frozenset({"damage"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.damage is not None
        return non_increasing({level: matrix.damage(level).kl for level in matrix.levels})
