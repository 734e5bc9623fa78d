"""PB-LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Format, SideTerm, Split, Stats, to_half
from ..linalg import cholesky
from ..parts import Sparse


@dataclass(frozen=True)
class Salient(Split, name="pb-llm"):
    """The salient part in 8 bits, the rest to be binary (PB-LLM, 2310.00034, section 3.2; codes of 1 bit).

    share: of the weights. Saliency is w² over the diagonal of the inverse Hessian, over the whole matrix; the authors'
    code takes the square of its Cholesky factor's diagonal, group by group.
    Salient weights are int8 under one float16 scale per row; in the codes their place holds what the binary weight of
    the rest's sign would, so that it costs the rest nothing.
    """

    share: float = 0.1
    damp: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    bits: ClassVar[tuple[int, int]] = (1, 2)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ElastiqError(f"pb-llm: share={self.share} must be above 0 and below 1")

    def split(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Tensor, tuple[SideTerm, ...]]:
        _, upper, _ = cholesky.factor_with_retry(stats.mean_hessian().to(weight.device), self.damp, "pb-llm")
        saliency = weight.square() / upper.square().sum(0)
        count = max(1, round(self.share * weight.numel()))
        where = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        where[saliency.flatten().topk(count).indices] = True
        where = where.view(weight.shape)
        size = (weight.abs() * ~where).sum(1) / (~where).sum(1).clamp_min(1)
        rest = torch.where(where, size[:, None] * torch.where(weight < 0, -1.0, 1.0), weight)
        apart = weight - rest
        scale = to_half(apart.abs().amax(1) / 127).clamp_min(2.0**-24)
        codes = (apart / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        return rest, (Sparse.at(where, codes[where], scale.half()),)
