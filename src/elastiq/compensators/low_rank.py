"""LoRC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Compensator, ElastiqError, SideTerm, Stats, mean, to_half
from ..linalg import leading_triplets
from ..parts import LowRank


@dataclass(frozen=True)
class LowRankError(Compensator, name="lorc"):
    """The leading singular directions of the error, in 16 bits (LoRC of ZeroQuant-V2, 2303.08302, section 4).

    rank: of the two factors, each taking the root of the singular values. aware: first scale every input channel by its
    root mean square, so that the error of the output falls and not of the weight (L2QER of LQER, 2402.02446).
    """

    rank: int = 8
    aware: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ElastiqError(f"lorc: rank={self.rank} must be at least 1")

    def fit(self, residual: Tensor, stats: Stats, level: int) -> tuple[SideTerm, ...]:
        size = torch.ones(residual.shape[1])
        if self.aware:
            size = stats.mean_diagonal(residual.shape[1]).clamp_min(1e-12).sqrt()
            size = (size / mean(size)).clamp_min(1e-3)
        size = size.to(residual)
        left, values, right = leading_triplets(residual * size, self.rank)
        root = values.sqrt()
        left, right = left * root, root[:, None] * right / size
        return (LowRank(to_half(left).half(), to_half(right).half(), level),)
