"""Codes, scales and zero points while they are trained, the steps they are trained by, and the course of a training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import (
    MIN_SCALE,
    Codes,
    ElastiqError,
    Grid,
    Journal,
    Objective,
    QuantizedWeight,
    Tuned,
    Tuner,
    decode_level,
    encode_level,
)

_STEPS_PER_SAVE = 8

Weights = Callable[[str], Tensor]


class Scales:
    """Scale and zero point [out, groups] of one level, with changes that are trained.

    A change of the scale is relative to it, one of the zero point in halves of the code's range, so that a step of
    either moves a group's extremes alike. Values pass through what they are stored as.
    """

    def __init__(self, grid: Grid, level: int) -> None:
        self._index, self._half_range = grid.levels.index(level), (2.0**level - 1) / 2
        self._level, self._stored = level, grid.scales
        self._scale, self._zero_point = grid.scale[self._index], grid.zero_point[self._index]
        self.trained = [torch.zeros_like(self._scale, requires_grad=True)]
        if not grid.symmetric:
            self.trained.append(torch.zeros_like(self._zero_point, requires_grad=True))

    def now(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, with gradients for the changes."""
        scale = (self._scale * (1 + self.trained[0])).clamp_min(MIN_SCALE)
        zero_point = None
        if len(self.trained) == 2:
            zero_point = self._zero_point + self._half_range * self.trained[1]
        with torch.no_grad():
            stored = encode_level(self._stored, self._level, scale, zero_point)
            read = decode_level(self._stored, self._level, stored, scale.shape[1], zero_point is None)
        scale = _as_read(scale, read[0])
        return scale, self._zero_point if zero_point is None else _as_read(zero_point, read[1])

    def put(self, scale: Tensor, zero_point: Tensor) -> None:
        """Write them into a grid's tensors [levels, out, groups]."""
        scale[self._index], zero_point[self._index] = (x.detach() for x in self.now())


class FixedCodes:
    """One matrix at one level: codes that stay, scales that are trained."""

    def __init__(self, weight: QuantizedWeight, level: int) -> None:
        codes = codes_of(weight)
        self._weight, self._codes, self._level, self._scales = weight, codes, level, Scales(codes.grid, level)
        self._grouped = grouped(codes.codes >> (codes.grid.bits - level), codes.grid.group_size)
        self.trained = self._scales.trained

    def decode(self) -> Tensor:
        """[out, in] with gradients for what is trained."""
        values: Tensor = _Decode.apply(*self._scales.now(), self._grouped)
        return self._weight.around(values[:, : self._codes.codes.shape[1]], self._level)

    def finished(self) -> QuantizedWeight:
        """The matrix with the trained scales, as they are stored."""
        return self._weight.with_first(with_scales(self._codes, [self._scales]))


class MovingCodes:
    """One matrix at several levels at once: codes that may move to a neighbouring cell, and scales, are trained.

    A weight's place is a number in cells of the lowest of `levels`; it starts where its code is. While it stays in its
    cell the code is left alone, so that nothing changes at any level; in another cell it takes the code there that is
    nearest to its own. Places move by at most `reach` cells. The gradient of a code is passed to the place as if values
    were linear in it.

    Where a code is a whole cell, because there are no wider levels, the place starts where `original` [out, in], what
    the matrix stands for, lies in it, and in the middle if that is elsewhere or not known.
    """

    def __init__(
        self, weight: QuantizedWeight, levels: Sequence[int], reach: float, original: Tensor | None = None
    ) -> None:
        codes = codes_of(weight)
        self._weight, self._codes, self._low, self._reach = weight, codes, levels[0], reach
        self._shift = codes.grid.bits - self._low
        within = 0.5 if original is None or self._shift else _within(weight, codes, original)
        self._start = (codes.codes + within) / 2**self._shift
        self.moves = torch.zeros(codes.codes.shape, device=codes.codes.device, requires_grad=True)
        self._scales = {level: Scales(codes.grid, level) for level in levels}
        self.trained = {level: scales.trained for level, scales in self._scales.items()}

    @torch.no_grad()
    def codes(self) -> Tensor:
        """uint8 [out, in] at the top level; brings the moves back into their bounds."""
        self.moves.clamp_(-self._reach, self._reach)
        cell = (self._start + self.moves).floor_().clamp_(0, 2**self._low - 1).int() << self._shift
        return self._codes.codes.int().clamp(cell, cell + (2**self._shift - 1)).to(torch.uint8)

    def decode(self, level: int) -> Tensor:
        """[out, in] with gradients for what is trained."""
        grid = self._codes.grid
        read = grouped(self.codes() >> (grid.bits - level), grid.group_size)
        moves = F.pad(self.moves, (0, -self.moves.shape[1] % grid.group_size)).unflatten(1, (-1, grid.group_size))
        values: Tensor = _Decode.apply(*self._scales[level].now(), read, moves, 2.0 ** (level - self._low))
        return self._weight.around(values[:, : self.moves.shape[1]], level)

    def finished(self) -> QuantizedWeight:
        """The matrix with its codes and scales, as they are stored."""
        return self._weight.with_first(with_scales(replace(self._codes, codes=self.codes()), self._scales.values()))


def _within(weight: QuantizedWeight, codes: Codes, original: Tensor) -> Tensor:
    """[out, in] where in the cells of its codes `original` lies, from 0 to 1, or beyond the ends of the grid; .5 where
    it lies in another cell."""
    grid, level = codes.grid, codes.grid.bits
    index = grid.levels.index(level)
    target = weight.inside(original.to(codes.codes.device))
    for term in weight.terms[1:]:
        target = target - term.dense(level)
    scale, zero_point = grid.scale[index].unsqueeze(-1), grid.zero_point[index].unsqueeze(-1)
    place = (grouped(target, grid.group_size) / scale + zero_point + 0.5).flatten(1)[:, : target.shape[1]]
    within = place - codes.codes
    low, high = codes.codes == 0, codes.codes == 2**level - 1
    return within.where((low | (within >= 0)) & (high | (within < 1)), 0.5)


def codes_of(weight: QuantizedWeight) -> Codes:
    """What of a matrix is trained: its first term. Raises ElastiqError if that is anything but codes."""
    codes = weight.terms[0]
    if not isinstance(codes, Codes):
        raise ElastiqError("a tuner works on nested integer codes; choose another format or solver")
    return codes


def with_scales(codes: Codes, trained: Iterable[Scales]) -> Codes:
    """`codes` with these scales in the place of its grid's."""
    scale, zero_point = codes.grid.scale.clone(), codes.grid.zero_point.clone()
    for each in trained:
        each.put(scale, zero_point)
    return replace(codes, grid=replace(codes.grid, scale=scale, zero_point=zero_point))


def grouped(x: Tensor, group_size: int) -> Tensor:
    """[out, groups, group_size] of x [out, in], the last group filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % group_size)).unflatten(1, (-1, group_size))


class Descent(ABC):
    """Steps against the gradients of several groups of tensors, going on from a saved state.

    before: the losses before the first step, which belong to that state.
    """

    kept: ClassVar[tuple[str, ...]]

    def __init__(self, groups: Sequence[Sequence[Tensor]], state: Mapping[str, Tensor]) -> None:
        self._groups = groups
        tensors = [tensor for group in groups for tensor in group]
        sizes = [tensor.numel() for tensor in tensors]
        zeros = torch.zeros(sum(sizes), device=tensors[0].device)
        self._kept = {key: state.get(key, zeros).to(zeros.device, copy=True) for key in self.kept}
        self._parts = {key: list(kept.split(sizes)) for key, kept in self._kept.items()}
        self.step = int(state.get("step", 0))
        self.before: list[float] = state["before"].tolist() if "before" in state else []
        if "changes" in state:
            for tensor, saved in zip(tensors, state["changes"].split(sizes), strict=True):
                tensor.data.copy_(saved.view_as(tensor))

    @torch.no_grad()
    def update(self, *rates: float) -> None:
        """One step of these sizes, one per group; the gradients are forgotten then."""
        self.step += 1
        tensors = [(tensor, rate) for group, rate in zip(self._groups, rates, strict=True) for tensor in group]
        for (tensor, rate), *kept in zip(tensors, *self._parts.values(), strict=True):
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            tensor.sub_(self._move(gradient.flatten(), *kept).mul_(rate).view_as(tensor))
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        return {
            "changes": torch.cat([tensor.detach().flatten() for group in self._groups for tensor in group]),
            "step": torch.tensor(self.step),
            "before": torch.tensor(self.before, dtype=torch.float64),
            **self._kept,
        }

    @abstractmethod
    def _move(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        """The step of size 1, a new tensor; brings `kept` up to date."""


class Adam(Descent):
    """Adam (Kingma and Ba, 2015, algorithm 1)."""

    kept = ("mean", "square")

    def _move(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        mean, square = kept
        mean.lerp_(gradient, 0.1)
        square.lerp_(gradient.square(), 0.05)
        spread = (square / (1 - 0.95**self.step)).sqrt_().add_(1e-12)
        return mean.div(1 - 0.9**self.step).div_(spread)


class SignDescent(Descent):
    """The sign of the gradient: SignSGD, as AutoRound uses it."""

    kept = ()

    def _move(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        return gradient.sign()


class Lion(Descent):
    """Lion (Chen and others, 2302.06675, algorithm 2), without weight decay."""

    kept = ("mean",)

    def _move(self, gradient: Tensor, *kept: Tensor) -> Tensor:
        (mean,) = kept
        move = mean.mul(0.9).add_(gradient, alpha=0.1).sign_()
        mean.lerp_(gradient, 0.01)
        return move


@dataclass(frozen=True)
class Course:
    """A training of `steps` steps of `batch` windows each, in an order drawn by `seed`, judged on `holdout` others.

    The rate rises over the first tenth of the steps and falls to zero by a cosine.
    """

    name: str
    steps: int
    batch: int
    holdout: int
    seed: int

    def calls(self, windows: int, levels: int) -> int:
        """Losses that `run` asks for."""
        return levels * (self.steps + 2 * -(-self._held(windows) // self.batch))

    def run(
        self,
        objective: Objective,
        levels: Sequence[int],
        weights: Callable[[int], Weights],
        descent: Descent,
        rates: Sequence[float],
        journal: Journal,
        *,
        judged: Callable[[int], Weights] | None = None,
        taught: bool = False,
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Losses of every level on the windows kept apart, before and after.

        weights: level -> the matrices with gradients. A step follows the sum over the levels of the loss relative to
        what it was before. rates: one per group of `descent`. judged: level -> the matrices as they will be stored,
        where that is another thing. taught: levels below the top are compared with the top level's answers as well.
        """
        order = torch.randperm(len(objective), generator=torch.Generator().manual_seed(self.seed)).tolist()
        kept = self._held(len(order))
        held, training = order[:kept], order[kept:] or order
        judged = judged or weights
        descent.before = descent.before or [self._judge(objective, judged(level), held) for level in levels]
        for step in range(descent.step, self.steps):
            batch = [training[i % len(training)] for i in range(step * self.batch, (step + 1) * self.batch)]
            answers = objective.answers(weights(levels[-1]), batch) if taught and len(levels) > 1 else None
            for level, before in zip(levels, descent.before, strict=True):
                loss = objective.loss(weights(level), batch, answers if level != levels[-1] else None)
                if not torch.isfinite(loss):
                    raise ElastiqError(
                        f"{self.name}: the loss at {level} bits is not finite after {step} steps; use a smaller rate"
                    )
                (loss / max(before, 1e-12)).backward()
            shape = min(1.0, (step + 1) / max(1, self.steps // 10)) * (1 + math.cos(math.pi * step / self.steps)) / 2
            descent.update(*(rate * shape for rate in rates))
            if descent.step % _STEPS_PER_SAVE == 0:
                journal.save(descent.state())
        after = [self._judge(objective, judged(level), held) for level in levels]
        return dict(zip(levels, descent.before, strict=True)), dict(zip(levels, after, strict=True))

    def _held(self, windows: int) -> int:
        """Windows to judge by: `holdout`, or a quarter of a text too short for that."""
        return min(self.holdout, max(1, windows // 4))

    def _judge(self, objective: Objective, weights: Weights, windows: Sequence[int]) -> float:
        total = 0.0
        with torch.no_grad():
            for first in range(0, len(windows), self.batch):
                batch = windows[first : first + self.batch]
                total += len(batch) * float(objective.loss(weights, batch))
        return total / len(windows)


class Part(Protocol):
    """One matrix while it is trained."""

    def finished(self) -> QuantizedWeight:
        """The matrix as it is stored."""


def kept_if_better(
    weights: Mapping[str, QuantizedWeight],
    parts: Mapping[str, Part],
    before: Mapping[int, float],
    after: Mapping[int, float],
) -> Tuned:
    """What `parts` became, or `weights` as they were unless the mean over the levels of what is left of the loss is
    below 1."""
    left = sum(after[level] / max(before[level], 1e-12) for level in before) / len(before)
    if not left < 1:
        return Tuned(weights, before, before)
    return Tuned({name: part.finished() for name, part in parts.items()}, before, after)


@dataclass(frozen=True)
class JointTuner(Tuner):
    """A tuner of codes and scales of all levels together: `steps` steps of `batch` windows, each at every level.

    rate: of what moves the codes. scale_rate: of relative changes of scales and zero points at 2 bits, times `falloff`
    for every further bit. holdout: windows kept apart to judge the result, which is given up if it is not better there.
    seed: of the order of windows.
    """

    bits: ClassVar[tuple[int, int]] = (2, 8)
    joint: ClassVar[bool] = True

    steps: int = 100
    batch: int = 4
    rate: float = 5e-3
    scale_rate: float = 1e-3
    falloff: float = 0.5
    holdout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f.name for f in fields(self) if f.name != "seed" and not getattr(self, f.name) > 0]
        if wrong:
            raise ElastiqError(f"{self.name}: {', '.join(wrong)} must be positive")

    @property
    def windows(self) -> int:
        return self.steps * self.batch + self.holdout

    @property
    def course(self) -> Course:
        return Course(self.name, self.steps, self.batch, self.holdout, self.seed)

    def calls(self, windows: int, levels: Sequence[int]) -> int:
        return self.course.calls(windows, len(levels))

    def rates(self, levels: Sequence[int]) -> list[float]:
        """Of the codes, then of each level's scales."""
        return [self.rate, *(self.scale_rate * self.falloff ** (level - 2) for level in levels)]


@dataclass(frozen=True)
class MovingTuner(JointTuner):
    """A `JointTuner` of `MovingCodes`, by the steps of `descent`.

    reach: how far a weight may move, in cells. rate: of the moves, in cells. taught: as in `Course.run`.
    """

    descent: ClassVar[type[Descent]]
    taught: ClassVar[bool] = False

    reach: float = 0.5

    def tune(
        self, objective: Objective, weights: Mapping[str, QuantizedWeight], levels: Sequence[int], journal: Journal
    ) -> Tuned:
        parts = {name: MovingCodes(w, levels, self.reach, objective.original(name)) for name, w in weights.items()}
        groups = [[part.moves for part in parts.values()]]
        groups += [[change for part in parts.values() for change in part.trained[level]] for level in levels]
        before, after = self.course.run(
            objective, levels, lambda level: lambda name: parts[name].decode(level),
            self.descent(groups, journal.load()), self.rates(levels), journal, taught=self.taught,
        )  # fmt: skip
        return kept_if_better(weights, parts, before, after)


def _as_read(x: Tensor, read: Tensor | None) -> Tensor:
    """What is read in the place of x; gradients pass through."""
    assert read is not None
    return read.float() + (x - x.detach())


class _Decode(torch.autograd.Function):
    """scale * (code - zero_point), keeping nothing of the size of the matrix but the codes for the backward pass.

    moves [out, groups, group_size]: what moved the codes; it gets the gradient of the value times scale and slope.
    """

    @staticmethod
    def forward(
        ctx: Any, scale: Tensor, zero_point: Tensor, codes: Tensor, moves: Tensor | None = None, slope: float = 0.0
    ) -> Tensor:
        """[out, columns] of scale and zero point [out, groups] and codes uint8 [out, groups, group_size]."""
        ctx.save_for_backward(scale, zero_point, codes)
        ctx.slope = slope
        return codes.float().sub_(zero_point.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, zero_point, codes = ctx.saved_tensors
        grad = grads[0].reshape(codes.shape)
        total = grad.sum(-1)
        moves = grad * (ctx.slope * scale).unsqueeze(-1) if ctx.needs_input_grad[3:4] == (True,) else None
        return (grad * codes).sum(-1) - zero_point * total, -scale * total, None, moves, None
