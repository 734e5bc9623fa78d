"""All levels of nested codes trained end to end, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import Codes, ElastiqError, Journal, Objective, Tuned, Tuner
from ..linalg.training import Adam, Course, MovingCodes, relative


@dataclass(frozen=True)
class CoDistillation(Tuner, name="co-distillation"):
    """Trains codes and scales of all levels at once, every level against the full model and against the top level.

    MatQuant (2502.06786), section 3, equation 7 and its co-distillation: the loss is a sum over the levels that the
    same codes are read at, and the wide level teaches the narrow ones. What differs: every level has scales of its own,
    the loss of a level is a distance (relative to what it was before) and not the text's, and codes start from the
    solver's: a weight keeps its code until it has moved to another cell of the lowest level.

    steps of `batch` windows, each at all levels, by Adam. reach: how far a weight may move, in cells. rate: of the
    moves, in cells. scale_rate: of relative changes of scales and zero points at 2 bits, times `falloff` for every
    further bit. holdout and seed: as in `ScaleTuning`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of the whole model, four times in float32")
    bits: ClassVar[tuple[int, int]] = (2, 8)
    joint: ClassVar[bool] = True

    steps: int = 40
    batch: int = 1
    reach: float = 0.5
    rate: float = 5e-3
    scale_rate: float = 2e-3
    falloff: float = 0.5
    holdout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.rate, self.scale_rate, self.reach, self.falloff)
        if min(self.steps, self.batch, self.holdout) < 1 or min(rates) <= 0:
            raise ElastiqError("co-distillation: every parameter but the seed must be positive")

    @property
    def windows(self) -> int:
        return self.steps * self.batch + self.holdout

    def calls(self, windows: int, levels: Sequence[int]) -> int:
        return self._course.calls(windows, len(levels))

    def tune(
        self, objective: Objective, terms: Mapping[str, Codes], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        parts = {name: MovingCodes(codes, levels, self.reach) for name, codes in terms.items()}
        groups = [[part.moves for part in parts.values()]]
        groups += [[change for part in parts.values() for change in part.trained[level]] for level in levels]
        rates = [self.rate, *(self.scale_rate * self.falloff ** (level - 2) for level in levels)]
        before, after = self._course.run(
            objective, levels, lambda level: lambda name: parts[name].decode(level),
            Adam(groups, journal.load()), rates, journal, taught=True,
        )  # fmt: skip
        if not relative(before, after) < 1:
            return Tuned(terms, before, before)
        return Tuned({name: part.finished() for name, part in parts.items()}, before, after)

    @property
    def _course(self) -> Course:
        return Course(self.name, self.steps, self.batch, self.holdout, self.seed)
