"""SmoothQuant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Fold, Format, Stats, Transform, mean
from ..parts import Diagonal


@dataclass(frozen=True)
class SmoothQuant(Transform, name="smooth"):
    """Moves the range of the activations into the weights: s = max|x|^alpha / max|w|^(1 - alpha) per channel
    (SmoothQuant, 2211.10438, equation 4).

    It is for 8 bits of weights and activations; weights alone it makes no easier. All inputs are smoothed, not
    only those behind a norm; where neither a norm nor a matrix can take the scales over, they stay at the input.
    """

    alpha: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"abs_max"})
    bits: ClassVar[tuple[int, int]] = (8, 8)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ElastiqError(f"smooth: alpha={self.alpha} must be between 0 and 1")

    def plan(self, consumers: Sequence[Tensor], stats: Stats, format: Format) -> Fold:
        weight = torch.stack([w.abs().amax(0) for w in consumers]).amax(0).clamp_min(1e-5)
        abs_max = stats.get("abs_max")
        if abs_max is None:
            raise ElastiqError("smooth: the largest inputs are not known here; put it before a rotation")
        x = abs_max.to(weight.device).clamp_min(1e-5)
        scale = x**self.alpha / weight ** (1 - self.alpha)
        return Diagonal.of(scale / math.exp(mean(scale.log())))
