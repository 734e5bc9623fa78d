"""Every token counts the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Seen, TokenWeights


@dataclass(frozen=True)
class Uniform(TokenWeights, name="uniform"):
    """Counts every token once, as GPTQ, AWQ and most papers do."""

    def weigh(self, seen: Seen) -> Tensor | None:
        return None
