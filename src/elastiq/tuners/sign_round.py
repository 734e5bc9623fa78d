"""Rounding and clipping of nested codes by signed gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import Codes, Journal, Objective, Tuned
from ..linalg.training import JointTuner, SignDescent, kept_if_better, moving


@dataclass(frozen=True)
class SignRound(JointTuner, name="sign-round"):
    """Moves codes to neighbouring cells, and scales and zero points with them, by the sign of the gradient.

    AutoRound (2309.05516), section 3, equations 3 to 5; AdaRound (2004.10568), section 3, is the same question asked
    with a penalty instead of a sign. What differs: it starts from the solver's codes and not from rounding; on nested
    codes a cell is one of the lowest level, a weight that stays in its cell keeps its code for all levels, and the loss
    is the sum over the levels, each relative to what it was before; a wide level therefore holds back moves that help a
    narrow one. Scales take the place of the clipping range: both ends of a group's range move.

    reach: how far a weight may move, in cells. rate: of the moves in cells, so that `steps * rate / 2` is about the
    longest way. Everything else as in `JointTuner`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of what is judged, in float32")

    reach: float = 0.5

    def tune(
        self, objective: Objective, terms: Mapping[str, Codes], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        parts, groups = moving(terms, levels, self.reach)
        before, after = self.course.run(
            objective, levels, lambda level: lambda name: parts[name].decode(level),
            SignDescent(groups, journal.load()), self.rates(levels), journal,
        )  # fmt: skip
        return kept_if_better(terms, parts, before, after)
