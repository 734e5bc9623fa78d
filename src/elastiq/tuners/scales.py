"""Scales and zero points trained against the full model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import ElastiqError, Journal, Objective, QuantizedWeight, Tuned, Tuner
from .training import Adam, Course, FixedCodes, kept_if_better


@dataclass(frozen=True)
class ScaleTuning(Tuner, name="scales"):
    """Trains the scales and zero points of one level, the codes staying as they are.

    EfficientQAT (2407.11062), section 3.3, and PEQA (2305.14152), section 3, do this to a checkpoint of one width with
    the loss of the text itself. Here every level has scales of its own over shared codes, so tuning one
    level touches no other and costs no bit; the loss is the distance to the full model, zero points are trained too,
    and values pass through half precision in training, as they are stored.

    steps of `batch` windows each at 2 bits, times `fewer` for every further bit, by Adam on relative changes: of the
    scale, and of the zero point in halves of the code's range, so that a step of either moves a group's extremes alike.
    rate: size of such a step at 2 bits, times `falloff` for every further bit; it rises over the first tenth of the
    steps and falls to zero by a cosine. holdout: windows kept apart to judge the result, which is given up if it is not
    better there. widest: level beyond which nothing is tuned: wider ones lose too little for such steps. seed: of the
    order of windows.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of what is judged")
    bits: ClassVar[tuple[int, int]] = (2, 8)

    steps: int = 240
    batch: int = 1
    rate: float = 6e-3
    falloff: float = 0.25
    fewer: float = 0.6
    holdout: int = 8
    widest: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.rate, self.falloff, self.fewer
        if min(self.steps, self.batch, self.holdout) < 1 or not all(size > 0 for size in sizes):
            raise ElastiqError("scales: steps, batch, holdout, rate, falloff and fewer must be positive")

    @property
    def windows(self) -> int:
        return self.steps * self.batch + self.holdout

    def groups(self, levels: Sequence[int]) -> list[tuple[int, ...]]:
        return [(level,) for level in levels if level <= self.widest]

    def calls(self, windows: int, levels: Sequence[int]) -> int:
        return self._course(levels[0]).calls(windows, 1)

    def tune(
        self, objective: Objective, weights: Mapping[str, QuantizedWeight], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        (level,) = levels
        parts = {name: FixedCodes(weight, level) for name, weight in weights.items()}
        adam = Adam([[change for part in parts.values() for change in part.trained]], journal.load())
        rate = self.rate * self.falloff ** (level - 2)
        before, after = self._course(level).run(
            objective, levels, lambda _: lambda name: parts[name].decode(), adam, [rate], journal
        )
        return kept_if_better(weights, parts, before, after)

    def _course(self, level: int) -> Course:
        steps = max(1, round(self.steps * self.fewer ** (level - 2)))
        return Course(self.name, steps, self.batch, self.holdout, self.seed)
