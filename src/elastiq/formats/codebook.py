"""A codebook per row, grown by splitting clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import MAX_BITS, ElastiqError, Format, Stats, to_half
from ..parts import TableGrid


@dataclass(frozen=True)
class Codebook(Format, name="codebook"):
    """Free numbers per row and level, nested: every cluster of a level splits in two at the next (Any-Precision,
    2402.10517, section 3.2), from weighted k-means at the lowest (SqueezeLLM, 2306.07629, section 4.1).

    Weights count by the squared gradient that calibration saw at the block's output (the papers: of the end loss), or
    by the Hessian's diagonal where there is none. A row's k-means is one-dimensional: clusters are intervals, started
    at quantiles of the weighted distribution, `sweeps` of Lloyd's algorithm; a split takes the best of all cuts.
    """

    levels: tuple[int, ...] = (2, 3, 4)
    sweeps: int = 20

    needs: ClassVar[frozenset[str]] = frozenset({"diagonal", "grad_sq"})

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        if not levels or list(levels) != list(range(max(levels[0], 1), min(levels[-1], MAX_BITS) + 1)):
            raise ElastiqError(f"codebook: levels={levels} must be neighbours between 1 and {MAX_BITS}, such as 2,3,4")
        if self.sweeps < 1:
            raise ElastiqError(f"codebook: sweeps={self.sweeps} must be at least 1")

    def overhead(self, in_features: int) -> int:
        return 16 * 2 ** self.levels[-1]

    def fit(self, weight: Tensor, stats: Stats) -> TableGrid:
        share = stats.get("grad_sq")
        if share is None or share.shape != weight.shape:
            share = stats.mean_diagonal(weight.shape[1]).expand_as(weight)
        ordered, order = weight.sort(dim=1)
        share = share.to(weight.device).gather(1, order).double().clamp_min(1e-30)
        sums = _Sums(ordered.double(), share / share.mean(1, keepdim=True) + 1e-6)
        edges = sums.means_split(self.levels[0], self.sweeps)
        tables = {}
        for level in self.levels:
            edges = edges if level == self.levels[0] else sums.halved(edges)
            tables[level] = to_half(sums.centres(edges).float()).half()
        names = ("",) * len(self.levels)
        return TableGrid(self.levels, weight.shape[1], (len(weight), weight.shape[1]), names, tables=tables)


class _Sums:
    """Weighted sums over any interval of the sorted weights of each row."""

    def __init__(self, x: Tensor, share: Tensor) -> None:
        self.x = x
        zero = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
        self.mass, self.first = (torch.cat([zero, v.cumsum(1)], 1) for v in (share, share * x))

    def centres(self, edges: Tensor) -> Tensor:
        """[rows, clusters] means of the intervals between `edges` [rows, clusters + 1]; of an empty one its neighbour's
        number, so that centres never fall."""
        mass, first = (s.gather(1, edges).diff(dim=1) for s in (self.mass, self.first))
        beside = self.x.gather(1, edges[:, :-1].clamp_max(self.x.shape[1] - 1))
        return torch.where(mass > 0, first / mass.clamp_min(1e-300), beside).cummax(1).values

    def means_split(self, bits: int, sweeps: int) -> Tensor:
        """Edges [rows, 2^bits + 1] of weighted k-means."""
        clusters = 2**bits
        targets = self.mass[:, -1:] * torch.arange(1, clusters, device=self.x.device) / clusters
        inner = torch.searchsorted(self.mass, targets.contiguous())
        for _ in range(sweeps):
            centres = self.centres(self._whole(inner))
            inner = torch.searchsorted(self.x.contiguous(), ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous())
        return self._whole(inner)

    def halved(self, edges: Tensor) -> Tensor:
        """Every interval cut where the two means explain the most."""
        low, high = edges[:, :-1], edges[:, 1:]
        cuts = torch.empty_like(low)
        at = torch.arange(self.mass.shape[1], device=self.x.device)
        for k in range(low.shape[1]):
            a, b = low[:, k : k + 1], high[:, k : k + 1]
            gain = torch.zeros_like(self.mass)
            for edge, sign in ((a, 1), (b, -1)):
                mass, first = (sign * (s - s.gather(1, edge)) for s in (self.mass, self.first))
                gain += first.square() / mass.clamp_min(1e-300)
            gain = torch.where((at >= a) & (at <= b) & torch.isfinite(gain), gain, -torch.inf)
            cuts[:, k] = torch.where(b[:, 0] - a[:, 0] > 1, gain[:, 1:-1].argmax(1) + 1, b[:, 0])
        return torch.cat([torch.stack([low, cuts], -1).flatten(1), edges[:, -1:]], 1)

    def _whole(self, inner: Tensor) -> Tensor:
        ends = torch.zeros(len(inner), 1, dtype=inner.dtype), torch.full((len(inner), 1), self.x.shape[1])
        return torch.cat([ends[0].to(inner.device), inner, ends[1].to(inner.device)], 1)
