"""Codes chosen among neighbours by a relaxation that hardens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Journal, Objective, QuantizedWeight, Tuned
from .training import JointTuner, Lion, Scales, codes_of, grouped, kept_if_better, with_scales


@dataclass(frozen=True)
class GumbelChoice(JointTuner, name="gumbel"):
    """Chooses every code among three, its own and one in either neighbouring cell, by Gumbel-softmax, with the scales.

    GSQ (2604.18556), section 3: logits over the candidates, a Gumbel-softmax sample of them at every step, and scales,
    by Lion, block by block from the solver's codes. What differs: on nested codes a cell is one of the lowest level,
    the candidate in a neighbouring one is the code there nearest to the weight's own, one choice is sampled for all
    levels, and the loss is the sum over the levels, each relative to what it was before. The paper takes all four codes
    at 2 bits and five above; its temperature and the scale of its logits, which move against each other, are one
    temperature here.

    strength: how much the logits prefer a weight's own code, per cell of distance. rate: of the logits. first, last:
    temperature, falling geometrically (docs/tuning.md has others). Everything else as in `JointTuner`.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of what is judged, several times in float32")

    rate: float = 0.5
    strength: float = 24.0
    first: float = 2.0
    last: float = 0.5

    def tune(
        self, objective: Objective, weights: Mapping[str, QuantizedWeight], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        parts = {name: _Choice(weight, levels, self.strength) for name, weight in weights.items()}
        groups = [[part.logits for part in parts.values()]]
        groups += [[change for part in parts.values() for change in part.trained[level]] for level in levels]
        lion = Lion(groups, journal.load())
        numbers = {name: index for index, name in enumerate(sorted(parts))}

        def sampled(level: int, name: str) -> Tensor:
            seed = (self.seed * 1_000_003 + lion.step) * 1_000_003 + numbers[name]
            temperature = self.first * (self.last / self.first) ** (lion.step / self.steps)
            return parts[name].sample(level, temperature, torch.Generator().manual_seed(seed))

        before, after = self.course.run(
            objective, levels, lambda level: lambda name: sampled(level, name), lion, self.rates(levels), journal,
            judged=lambda level: lambda name: parts[name].finished().dequantize(level),
        )  # fmt: skip
        return kept_if_better(weights, parts, before, after)


class _Choice:
    """One matrix: logits [3, out, in] of the cell below, the code as it is, the cell above."""

    def __init__(self, weight: QuantizedWeight, levels: Sequence[int], strength: float) -> None:
        self._weight, codes = weight, codes_of(weight)
        own, bits, low = codes.codes.int(), codes.grid.bits, levels[0]
        size = 2 ** (bits - low)
        cell = own // size
        below, above = cell * size - 1, (cell + 1) * size
        self._codes = codes
        self._candidates = torch.stack([below.clamp_min(0), own, above.clamp_max(2**bits - 1)])
        place = (own.float() + 0.5) / size - cell
        logits = -strength * torch.stack([place, torch.zeros_like(place), 1 - place])
        logits[0][cell == 0] = -torch.inf
        logits[2][cell == 2**low - 1] = -torch.inf
        self.logits = logits.requires_grad_()
        self._scales = {level: Scales(codes.grid, level) for level in levels}
        self.trained = {level: scales.trained for level, scales in self._scales.items()}

    def sample(self, level: int, temperature: float, generator: torch.Generator) -> Tensor:
        """[out, in] at `level`, a mixture of the candidates, with gradients for what is trained."""
        uniform = torch.rand(self.logits.shape, generator=generator).to(self.logits.device).clamp_(1e-7, 1 - 1e-7)
        share = ((self.logits - (-uniform.log()).log()) / temperature).softmax(0)
        read = (self._candidates >> (self._codes.grid.bits - level)).float()
        scale, zero_point = self._scales[level].now()
        code = grouped((share * read).sum(0), self._codes.grid.group_size)
        value: Tensor = (scale.unsqueeze(-1) * (code - zero_point.unsqueeze(-1))).flatten(1)
        return self._weight.around(value[:, : read.shape[2]], level)

    @torch.no_grad()
    def finished(self) -> QuantizedWeight:
        """The matrix with the most likely codes, and its scales as they are stored."""
        best = self.logits.argmax(0, keepdim=True)
        codes = self._candidates.gather(0, best)[0].to(torch.uint8)
        return self._weight.with_first(with_scales(replace(self._codes, codes=codes), self._scales.values()))
