"""Tokens weighed by the attention they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import ElastiqError, Seen, TokenWeights


@dataclass(frozen=True)
class AttentionConcentration(TokenWeights, name="attention-concentration"):
    """Counts a token by the attention that all heads and later tokens of its window pay to it.

    RSQ (2503.01820), section 4.3 (AttnCon): the sum over heads and queries, mapped linearly within the window so that
    the token that gets least counts `least` and the one that gets most counts 1, then scaled so that every window
    counts the same. As in the authors' code the result weighs the squares of the token's features; their search over
    `least` is 0.1 to 0.005, the last of which they run with.
    """

    attention: ClassVar[bool] = True
    resources: ClassVar[tuple[str, ...]] = ("attention probabilities of one block",)

    least: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ElastiqError(f"attention-concentration: least={self.least} must be above 0 and at most 1")

    def weigh(self, seen: Seen) -> Tensor | None:
        assert seen.attention is not None
        received = seen.attention.float().sum(dim=(1, 2))
        low, high = received.amin(dim=-1, keepdim=True), received.amax(dim=-1, keepdim=True)
        counts = self.least + (1 - self.least) * (received - low) / (high - low).clamp_min(1e-12)
        return counts / counts.mean(dim=-1, keepdim=True)
