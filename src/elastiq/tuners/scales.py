"""Scales and zero points trained against the full model's answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import MIN_SCALE, Codes, ElastiqError, Journal, Objective, Tuned, Tuner, to_half

_STEPS_PER_SAVE = 8


@dataclass(frozen=True)
class ScaleTuning(Tuner, name="scales"):
    """Trains the scales and zero points of one level end to end, the codes staying as they are.

    EfficientQAT (2407.11062), section 3.3, and PEQA (2305.14152), section 3, do this to a checkpoint of one width with
    the loss of the text itself. Here every level has scales of its own over shared codes, so tuning one
    level touches no other and costs no bit; the loss is the distance to the full model, zero points are trained too,
    and values pass through half precision in training, as they are stored.

    steps of `batch` windows each at 2 bits, times `fewer` for every further bit, by Adam on relative changes: of the
    scale, and of the zero point in halves of the code's range, so that a step of either moves a group's extremes alike.
    rate: size of such a step at 2 bits, times `falloff` for every further bit; it rises over the first tenth of the
    steps and falls to zero by a cosine. holdout: windows kept apart to judge the result, which is given up if it is not
    better there. seed: of the order of windows.
    """

    resources: ClassVar[tuple[str, ...]] = ("gradients", "memory of the whole model")
    bits: ClassVar[tuple[int, int]] = (2, 8)

    steps: int = 28
    batch: int = 4
    rate: float = 8e-3
    falloff: float = 0.62
    fewer: float = 0.8
    holdout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.holdout) < 1 or min(self.rate, self.falloff, self.fewer) <= 0:
            raise ElastiqError("scales: steps, batch, holdout, rate, falloff and fewer must be positive")

    @property
    def windows(self) -> int:
        return self.steps * self.batch + self.holdout

    def calls(self, windows: int, level: int) -> int:
        return self._steps(level) + 2 * -(-self._held(windows) // self.batch)

    def tune(self, objective: Objective, terms: Mapping[str, Codes], level: int, journal: Journal) -> Tuned:
        parts = {name: _Part(codes, level) for name, codes in terms.items()}
        order = torch.randperm(len(objective), generator=torch.Generator().manual_seed(self.seed)).tolist()
        kept = self._held(len(order))
        held, training = order[:kept], order[kept:] or order
        adam = _Adam([change for part in parts.values() for change in part.trained], journal.load())
        if adam.before is None:
            adam.before = self._mean_loss(objective, parts, held)
        self._train(objective, parts, training, level, adam, journal)
        after = self._mean_loss(objective, parts, held)
        if not after < adam.before:
            return Tuned(terms, adam.before, adam.before)
        return Tuned({name: part.codes() for name, part in parts.items()}, adam.before, after)

    def _steps(self, level: int) -> int:
        return max(1, round(self.steps * self.fewer ** (level - 2)))

    def _held(self, windows: int) -> int:
        """Windows to judge by: `holdout`, or a quarter of a text too short for that."""
        return min(self.holdout, max(1, windows // 4))

    def _mean_loss(self, objective: Objective, parts: Mapping[str, _Part], windows: Sequence[int]) -> float:
        total = 0.0
        with torch.no_grad():
            for first in range(0, len(windows), self.batch):
                batch = windows[first : first + self.batch]
                total += len(batch) * float(objective.loss(lambda name: parts[name].decode(), batch))
        return total / len(windows)

    def _train(
        self,
        objective: Objective,
        parts: Mapping[str, _Part],
        windows: Sequence[int],
        level: int,
        adam: _Adam,
        journal: Journal,
    ) -> None:
        peak, steps = self.rate * self.falloff ** (level - 2), self._steps(level)
        for step in range(adam.step, steps):
            rate = peak * min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2
            batch = [windows[i % len(windows)] for i in range(step * self.batch, (step + 1) * self.batch)]
            loss = objective.loss(lambda name: parts[name].decode(), batch)
            if not torch.isfinite(loss):
                raise ElastiqError(
                    f"scales: the loss at {level} bits is not finite after {step} steps; use a smaller rate"
                )
            loss.backward()
            adam.update(rate)
            if adam.step % _STEPS_PER_SAVE == 0:
                journal.save(adam.state())


class _Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1) over several tensors, going on from a saved state.

    before: the loss before the first step, which belongs to that state.
    """

    def __init__(self, trained: list[Tensor], state: Mapping[str, Tensor]) -> None:
        self._trained = trained
        sizes = [change.numel() for change in trained]
        zeros = torch.zeros(sum(sizes), device=trained[0].device)
        self._mean, self._square = (state.get(key, zeros).to(zeros.device, copy=True) for key in ("mean", "square"))
        self.step = int(state.get("step", 0))
        self.before = float(state["before"]) if "before" in state else None
        for change, saved in zip(trained, state.get("changes", zeros).split(sizes), strict=True):
            change.data.copy_(saved.view_as(change))

    @torch.no_grad()
    def update(self, rate: float, decay: float = 0.9, decay_square: float = 0.95) -> None:
        """One step of size `rate` against the gradients, which are then forgotten."""
        gradients = (torch.zeros_like(c) if c.grad is None else c.grad for c in self._trained)
        gradient = torch.cat([each.flatten() for each in gradients])
        self.step += 1
        self._mean.lerp_(gradient, 1 - decay)
        self._square.lerp_(gradient.square(), 1 - decay_square)
        spread = (self._square / (1 - decay_square**self.step)).sqrt_().add_(1e-12)
        move = self._mean.div(1 - decay**self.step).div_(spread).mul_(rate)
        for change, part in zip(self._trained, move.split([c.numel() for c in self._trained]), strict=True):
            change.sub_(part.view_as(change))
            change.grad = None

    def state(self) -> dict[str, Tensor]:
        return {
            "changes": torch.cat([change.detach().flatten() for change in self._trained]),
            "mean": self._mean,
            "square": self._square,
            "step": torch.tensor(self.step),
            "before": torch.tensor(self.before, dtype=torch.float64),
        }


class _Part:
    """One matrix at one level: fixed codes, and relative changes of its scale and zero point that are trained."""

    def __init__(self, codes: Codes, level: int) -> None:
        grid = codes.grid
        self._codes, self._index, self._half_range = codes, grid.levels.index(level), (2.0**level - 1) / 2
        self._scale, self._zero_point = grid.scale[self._index], grid.zero_point[self._index]
        padded = F.pad(codes.codes >> (grid.bits - level), (0, -codes.codes.shape[1] % grid.group_size))
        self._grouped = padded.unflatten(1, (-1, grid.group_size))
        self.trained = [torch.zeros_like(self._scale, requires_grad=True)]
        if not grid.symmetric:
            self.trained.append(torch.zeros_like(self._zero_point, requires_grad=True))

    def decode(self) -> Tensor:
        """[out, in] with gradients for what is trained."""
        values: Tensor = _Decode.apply(*self._now(), self._grouped)
        return values[:, : self._codes.codes.shape[1]]

    def codes(self) -> Codes:
        """The matrix with the trained scales, as they are stored."""
        grid = self._codes.grid
        scale, zero_point = grid.scale.clone(), grid.zero_point.clone()
        scale[self._index], zero_point[self._index] = (x.detach() for x in self._now())
        return replace(self._codes, grid=replace(grid, scale=scale, zero_point=zero_point))

    def _now(self) -> tuple[Tensor, Tensor]:
        scale = _half(self._scale * (1 + self.trained[0])).clamp_min(MIN_SCALE)
        if len(self.trained) == 1:
            return scale, self._zero_point
        return scale, _half(self._zero_point + self._half_range * self.trained[1])


def _half(x: Tensor) -> Tensor:
    """Rounded as it is stored; gradients pass through."""
    return to_half(x).detach() + (x - x.detach())


class _Decode(torch.autograd.Function):
    """scale * (code - zero_point), keeping nothing of the size of the matrix but the codes for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        """[out, columns] of scale and zero point [out, groups] and codes uint8 [out, groups, group_size]."""
        ctx.save_for_backward(scale, zero_point, codes)
        return codes.float().sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, zero_point, codes = ctx.saved_tensors
        grad = grads[0].reshape(codes.shape)
        total = grad.sum(-1)
        return (grad * codes).sum(-1) - zero_point * total, -scale * total, None
