"""From what each matrix loses at each level to a level for every matrix: two kinds of step and what they are told."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .error import ElastiqError
from .stats import Stats
from .step import Step

Floats = NDArray[np.float64]
Choices = tuple[int, ...]
"""Index of a level for every item of a problem."""

SLACK = 1e-12
"""Relative rounding error of a sum of costs in double precision; costs counted in bits are exact."""


@dataclass(frozen=True)
class Damage:
    """What a level map does to a model on a text, per predicted token, in nats.

    kl: mean KL divergence from the reference. nll: mean loss of the token that came, less the reference's.
    """

    kl: float
    nll: float


@dataclass(frozen=True)
class Evidence:
    """What is known about one matrix (or all experts of one tensor, their rows below one another); fields that no step
    `needs` are None.

    levels: the candidates, ascending. errors: relative output error per level, from quantization. energy: what a
    relative error of 1 would move at the output of the matrix's block, as a part of that output. weight: [out, in]
    float32 at the widest level. quantized: level -> [out, in]. stats: of the input (experts: none). gradient, fisher:
    [out, in] mean and mean square of the gradients of the windows' mean losses. trace: of the loss's Hessian.
    eigenvalue: the largest of the mean of the gradients' outer products. block_input, block_output: [tokens, hidden]
    float32 around the decoder block, None outside the blocks. slopes: level -> [draws] derivatives, along the change
    that reading at the level makes, of the loss of a window's labels when they are drawn from what the model predicts,
    over the root of their number; drawn: [out, in] mean square of the same gradients, per token. damage: level -> what
    lowering the matrix, and those that share its level, does to the model.
    """

    levels: tuple[int, ...]
    errors: Mapping[int, float] | None = None
    energy: float = 1.0
    weight: Tensor | None = None
    quantized: Callable[[int], Tensor] | None = None
    stats: Stats | None = None
    gradient: Tensor | None = None
    fisher: Tensor | None = None
    trace: float | None = None
    eigenvalue: float | None = None
    block_input: Tensor | None = None
    block_output: Tensor | None = None
    slopes: Mapping[int, Tensor] | None = None
    drawn: Tensor | None = None
    damage: Callable[[int], Damage] | None = None

    def error(self, level: int) -> float:
        """The relative output error at `level`."""
        assert self.errors is not None
        return self.errors[level]

    def change(self, level: int) -> Tensor:
        """[out, in] of what reading at `level` changes in the weight."""
        assert self.weight is not None and self.quantized is not None
        return self.quantized(level) - self.weight


EVIDENCE = frozenset(
    {"errors", "weight", "stats", "gradient", "fisher", "trace", "eigenvalue", "blocks", "slopes", "damage"}
)
"""What a sensitivity may ask for: fields of `Evidence`; `weight` brings `quantized`, `blocks` both ends of a block,
`slopes` brings `drawn`. `errors` stand in the level table."""


class Sensitivity(Step, slot="sensitivity"):
    """What a matrix loses at each level. `needs` lists members of EVIDENCE."""

    @abstractmethod
    def measure(self, matrix: Evidence) -> dict[int, float]:
        """Loss of every level in `matrix.levels`: finite, not negative, not increasing in the level, and in one unit
        for all matrices of a model, so that losses add."""

    def rows(self, matrix: Evidence) -> Tensor | None:
        """[levels, rows] not negative, how the loss at each level is shared among the rows; None where unknown."""
        return None


def non_increasing(losses: Mapping[int, float]) -> dict[int, float]:
    """`losses` without rises: each level takes the largest of its own and all wider ones; nothing is negative."""
    result: dict[int, float] = {}
    worst = 0.0
    for level in sorted(losses, reverse=True):
        worst = max(worst, losses[level])
        result[level] = worst
    return dict(sorted(result.items()))


@dataclass(frozen=True)
class Problem:
    """One level per item: the least sum of losses with every sum of costs within its limit.

    levels: ascending. weights: [items], how many weights an item has. loss: [items, levels], not increasing along the
    levels. costs: [limits, items, levels], not decreasing along them. limits: [limits]. starts: choices that are known
    to be good, for those that search from somewhere.
    """

    levels: tuple[int, ...]
    weights: Floats
    loss: Floats
    costs: Floats
    limits: Floats
    starts: tuple[Choices, ...] = field(default=())

    def __post_init__(self) -> None:
        shape = (len(self.weights), len(self.levels))
        if self.loss.shape != shape or self.costs.shape != (len(self.limits), *shape):
            raise ElastiqError(f"allocation: losses {self.loss.shape} and costs {self.costs.shape} are not of {shape}")
        if not (np.isfinite(self.loss).all() and np.isfinite(self.costs).all()):
            raise ElastiqError("allocation: a loss or a cost is not finite; measure the sensitivity again")

    @property
    def items(self) -> int:
        return len(self.weights)

    def total_loss(self, choices: Choices) -> float:
        return float(self.loss[np.arange(self.items), list(choices)].sum())

    def total_costs(self, choices: Choices) -> Floats:
        """[limits] of a map."""
        total: Floats = self.costs[:, np.arange(self.items), list(choices)].sum(axis=1)
        return total

    def fits(self, choices: Choices) -> bool:
        """Whether every limit holds."""
        return self.holds(self.total_costs(choices))

    def holds(self, costs: Floats) -> bool:
        """Whether total costs [limits] are within the limits."""
        return bool((costs <= self.limits + SLACK * np.abs(self.limits)).all())


@dataclass(frozen=True)
class Solution:
    """Choices, and a proved lower bound of the loss of any choices within the limits, where the step has one."""

    choices: Choices
    bound: float = 0.0


class Allocator(Step, slot="allocator"):
    """Which level every item gets. `exact`: the loss is the least possible, but for the gap the step allows itself.
    `measures`: it wants `damage`, without which it searches on predicted losses."""

    exact: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    @abstractmethod
    def allocate(self, problem: Problem, damage: Callable[[Choices], float] | None = None) -> Solution:
        """Choices within every limit. damage: measures the whole model with choices, for those that ask for it.

        Called only for a problem whose lowest choices fit.
        """
