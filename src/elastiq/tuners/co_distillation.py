"""All levels of nested codes trained end to end, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import Codes, Journal, Objective, Tuned
from ..linalg.training import Adam, JointTuner, kept_if_better, moving


@dataclass(frozen=True)
class CoDistillation(JointTuner, name="co-distillation"):
    """Trains codes and scales of all levels at once, every level against the full model and against the top level.

    MatQuant (2502.06786), section 3, equation 7 and its co-distillation: the loss is a sum over the levels that the
    same codes are read at, and the wide level teaches the narrow ones. What differs: every level has scales of its own,
    the loss of a level is a distance (relative to what it was before) and not the text's, and codes start from the
    solver's: a weight keeps its code until it has moved to another cell of the lowest level.

    By Adam. reach: how far a weight may move, in cells. rate: of the moves, in cells. Everything else as in
    `JointTuner`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of the whole model, four times in float32")

    steps: int = 40
    batch: int = 1
    scale_rate: float = 2e-3
    reach: float = 0.5

    def tune(
        self, objective: Objective, terms: Mapping[str, Codes], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        parts, groups = moving(terms, levels, self.reach)
        before, after = self.course.run(
            objective, levels, lambda level: lambda name: parts[name].decode(level),
            Adam(groups, journal.load()), self.rates(levels), journal, taught=True,
        )  # fmt: skip
        return kept_if_better(terms, parts, before, after)
