"""AWQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Fold, Format, Stats, Transform, total
from ..parts import Diagonal


@dataclass(frozen=True)
class ActivationAware(Transform, name="awq"):
    """Scales salient channels up before rounding: s = mean|x|^alpha, alpha searched (AWQ, 2306.00978, section 3.2,
    equations 4 and 5, on a grid of `steps`).

    Judged by the matrices' output error, tr(E H Eᵀ) at `level`, 0 being the lowest of the format; the paper runs the
    block. Clipping is the format's own search (the paper's second step, on the range itself). As in the authors' code s
    is divided by sqrt(max s min s).
    """

    steps: int = 20
    level: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "diagonal", "abs_mean"})
    bits: ClassVar[tuple[int, int]] = (3, 8)

    def __post_init__(self) -> None:
        self.require_at_least(steps=1, level=0)

    def plan(self, consumers: Sequence[Tensor], stats: Stats, format: Format) -> Fold:
        abs_mean = stats.get("abs_mean")
        if abs_mean is None:
            raise ElastiqError("awq: the inputs' mean sizes are not known here; put it before a rotation")
        hessian, level = stats.mean_hessian(), self.level or format.levels[0]
        if len(format.levels) > 1:
            format = replace(format, levels=(level,))  # type: ignore[type-var]
        size = (abs_mean / stats.total).to(consumers[0].device).clamp_min(1e-6)
        best, found = torch.inf, torch.ones_like(size)
        for step in range(self.steps):
            scale = size ** (step / self.steps)
            fold = Diagonal.of(scale / (scale.max() * scale.min()).sqrt())
            loss = 0.0
            for weight in consumers:
                inner = fold.into(weight)
                grid = format.fit(inner, fold.stats(stats))
                error = weight - fold.out_of(grid.dequantize(grid.quantize(inner), grid.bits))
                loss += total((error @ hessian.to(error)) * error)
            if loss < best:
                best, found = loss, fold.scale.float()
        return Diagonal.of(found)
