"""Tokens weighed by what the block's output feels of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core import Seen, TokenWeights


@dataclass(frozen=True)
class BlockOutput(TokenWeights, name="block-output"):
    """Counts a token for a matrix by how far the block's output moves when the matrix's output does at that token.

    That is the squared norm of the gradient, there, of the block's output times a random direction: a one-sample
    Hutchinson estimate of the Jacobian's norm. Close to GuidedQuant (2505.07004), but of the block instead of the end
    loss, so that one block in memory is enough. It tells that the keys and values of the few tokens everyone attends
    to must be exact.
    """

    gradients: ClassVar[bool] = True
    resources: ClassVar[tuple[str, ...]] = ("gradients of one block",)

    def weigh(self, seen: Seen) -> Tensor | None:
        return None if seen.gradient is None else seen.gradient.float().square().sum(dim=-1)


BLOCK_OUTPUT = BlockOutput()
"""The token weights of recipes that name no others."""
