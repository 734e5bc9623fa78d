"""Rounding and clipping of nested codes by signed gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import Codes, ElastiqError, Journal, Objective, Tuned, Tuner
from ..linalg.training import Course, MovingCodes, SignDescent, relative


@dataclass(frozen=True)
class SignRound(Tuner, name="sign-round"):
    """Moves codes to neighbouring cells, and scales and zero points with them, by the sign of the gradient.

    AutoRound (2309.05516), section 3, equations 3 to 5; AdaRound (2004.10568), section 3, is the same question asked
    with a penalty instead of a sign. What differs: it starts from the solver's codes and not from rounding; on nested
    codes a cell is one of the lowest level, a weight that stays in its cell keeps its code for all levels, and the loss
    is the sum over the levels, each relative to what it was before; a wide level therefore holds back moves that help a
    narrow one. Scales take the place of the clipping range: both ends of a group's range move.

    steps of `batch` windows. reach: how far a weight may move, in cells. rate: of the moves in cells, so that
    `steps * rate / 2` is about the longest way. scale_rate: of relative changes of scales and zero points at 2 bits,
    times `falloff` for every further bit. holdout and seed: as in `ScaleTuning`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of what is judged, in float32")
    bits: ClassVar[tuple[int, int]] = (2, 8)
    joint: ClassVar[bool] = True

    steps: int = 100
    batch: int = 4
    reach: float = 0.5
    rate: float = 5e-3
    scale_rate: float = 1e-3
    falloff: float = 0.5
    holdout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        rates = (self.rate, self.scale_rate, self.reach, self.falloff)
        if min(self.steps, self.batch, self.holdout) < 1 or min(rates) <= 0:
            raise ElastiqError("sign-round: every parameter but the seed must be positive")

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
            SignDescent(groups, journal.load()), rates, journal,
        )  # fmt: skip
        if not relative(before, after) < 1:
            return Tuned(terms, before, before)
        return Tuned({name: part.finished() for name, part in parts.items()}, before, after)

    @property
    def _course(self) -> Course:
        return Course(self.name, self.steps, self.batch, self.holdout, self.seed)
