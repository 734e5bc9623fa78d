"""LLM.int8()."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Format, SideTerm, Split, Stats, mean, to_half
from ..parts import Channels


@dataclass(frozen=True)
class OutlierFeatures(Split, name="llm-int8"):
    """Input channels with outliers stay in 16 bits (LLM.int8, 2208.07339, section 3.2): those where some |x| seen in
    calibration reached `threshold`.

    In the codes they are zeros, so the format must have that number (`minifloat` with `int8`: the paper's absmax rows).
    The paper looks at every batch when it runs; here the channels are settled once. With `relative`, the threshold
    counts in units of the input's root mean square.
    """

    threshold: float = 6.0
    relative: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"abs_max", "diagonal"})
    bits: ClassVar[tuple[int, int]] = (8, 8)

    def __post_init__(self) -> None:
        self.require_at_least(threshold=0)

    def split(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Tensor, tuple[SideTerm, ...]]:
        abs_max = stats.get("abs_max")
        if abs_max is None:
            return weight, ()
        unit = math.sqrt(mean(stats.mean_diagonal(weight.shape[1]))) if self.relative else 1.0
        index = torch.nonzero(abs_max >= self.threshold * unit).flatten().to(weight.device)
        if not len(index):
            return weight, ()
        rest = weight.clone()
        rest[:, index] = 0.0
        return rest, (Channels(index.int(), to_half(weight[:, index]).half(), weight.shape[1]),)
