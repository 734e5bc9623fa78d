"""SpQR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Format, SideTerm, Split, Stats, to_half
from ..linalg import cholesky
from ..parts import Sparse
from ..parts.fitting import group_columns, grouped


@dataclass(frozen=True)
class SensitiveWeights(Split, name="spqr"):
    """Single weights whose rounding costs most stay sparse in 16 bits (SpQR, 2306.03078, section 4 and algorithm 1).

    share: of the weights. What a weight costs is what its group's squared rounding error at the format's lowest level,
    over the diagonal of the inverse Hessian, falls by when the weight is left out of the fit of the scales and has no
    error: refitted for the largest and the smallest of a group, for the others their own error. `rounds` of picking
    (the paper: a threshold, group after group within GPTQ). In the codes its place takes the group's mean, so that it
    stretches no range.
    """

    share: float = 0.01
    damp: float = 0.01
    rounds: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "diagonal"})
    bits: ClassVar[tuple[int, int]] = (2, 4)

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            raise ElastiqError(f"spqr: share={self.share} must be above 0 and below 0.5")
        if self.rounds < 1:
            raise ElastiqError(f"spqr: rounds={self.rounds} must be at least 1")

    def split(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Tensor, tuple[SideTerm, ...]]:
        _, upper, _ = cholesky.factor_with_retry(stats.mean_hessian().to(weight.device), self.damp, "spqr")
        inverse = upper.square().sum(0)  # the diagonal of Uᵀ U
        size = group_columns(getattr(format, "group_size", -1), weight.shape[1])
        where = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        for done in range(1, self.rounds + 1):
            gain = _gain(weight, where, inverse, size, format, stats).masked_fill(where, torch.inf).flatten()
            count = max(1, round(self.share * weight.numel() * done / self.rounds))
            where = torch.zeros_like(where).flatten().index_fill(0, gain.topk(count).indices, True).view(weight.shape)
        rest = _filled(weight, where, size)
        return rest, (Sparse.at(where, to_half((weight - rest)[where]).half()),)


def _gain(weight: Tensor, where: Tensor, inverse: Tensor, size: int, format: Format, stats: Stats) -> Tensor:
    """[out, in] of what is won by setting each weight apart beside those of `where`."""

    def losses(apart: Tensor) -> Tensor:
        grid = format.fit(_filled(weight, apart, size), stats)
        error = (weight - grid.dequantize(grid.quantize(weight), format.levels[0])).masked_fill(apart, 0.0)
        return grouped(error.square() / inverse, size)

    base = losses(where)
    gain = base.clone()
    for sign in (1, -1):
        extreme = grouped((sign * weight).masked_fill(where, -torch.inf), size, -torch.inf).argmax(-1, keepdim=True)
        apart = torch.zeros_like(gain, dtype=torch.bool).scatter_(-1, extreme, True).flatten(1)[:, : weight.shape[1]]
        gain.scatter_(-1, extreme, (base.sum(-1) - losses(where | apart).sum(-1))[..., None])
    return gain.flatten(1)[:, : weight.shape[1]]


def _filled(weight: Tensor, where: Tensor, size: int) -> Tensor:
    """`weight` with the mean of their group's others in the places of `where`."""
    kept = grouped((~where).float(), size)
    mean = (grouped(weight, size) * kept).sum(-1) / kept.sum(-1).clamp_min(1)
    fill = mean.repeat_interleave(size, dim=1)[:, : weight.shape[1]]
    return torch.where(where, fill, weight)
