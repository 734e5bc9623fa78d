"""Two losses kept apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..core import Evidence, Sensitivity, non_increasing


@dataclass(frozen=True)
class Decoupled(Sensitivity, name="decoupled"):
    """Metric-decoupled sensitivity (MixDQ, 2405.17873): two damages are measured apart and the worse one
    counts, so that neither hides behind the other.

    The paper's are an image's content and quality; here, both in nats per token, the KL divergence from the widest
    model and the rise of the loss of the text that came.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"damage"})

    def measure(self, matrix: Evidence) -> dict[int, float]:
        assert matrix.damage is not None
        damages = {level: matrix.damage(level) for level in matrix.levels}
        return non_increasing({level: max(d.kl, d.nll) for level, d in damages.items()})
