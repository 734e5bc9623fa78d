"""What calibration learns about the input of a matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .error import ElastiqError
from .sums import total


@dataclass(frozen=True)
class Rows:
    """Finite rows x [n, in] that reached a matrix, float32. weights: [n], what each counts. gradient: [n, out], what
    came back to the rows' outputs, where it did."""

    x: Tensor
    weights: Tensor
    gradient: Tensor | None = None


class Statistic(ABC):
    """A sum over rows, called what the `needs` of a step call it: `class AbsMax(Statistic, name="abs_max")`.

    gradients: it wants those of the outputs. weighted: it measures errors, so that a pass that weighs tokens is made
    for it; the others are satisfied with whatever pass there is.
    """

    gradients: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Statistic]]] = {}

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name in Statistic.registry:
            raise ElastiqError(f"statistic: the name {name!r} is taken by {Statistic.registry[name].__name__}")
        Statistic.registry[name] = cls

    @staticmethod
    def empty(in_features: int, device: torch.device | str) -> Tensor:
        """Of no rows: zeros [in], unless a statistic says otherwise."""
        return torch.zeros(in_features, device=device)

    @staticmethod
    @abstractmethod
    def add(total: Tensor, rows: Rows) -> Tensor:
        """`total` with these rows; it may be written to."""

    @staticmethod
    def join(a: Tensor, b: Tensor) -> Tensor:
        """Of both sets of rows, a new tensor."""
        return a + b

    @staticmethod
    @abstractmethod
    def divided(total: Tensor, scale: Tensor) -> Tensor:
        """Of the rows x / scale, scale [in], a new tensor."""


@dataclass
class Stats:
    """Statistics of the rows x [in] that reached a matrix; only those a recipe asks for are kept.

    count: rows seen; dropped: rows left out because they held NaN or infinity. total: sum of the rows' weights.
    sums: each `Statistic` by its name.
    """

    count: int = 0
    total: float = 0.0
    dropped: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def empty(
        in_features: int, needs: Collection[str] | None = None, device: torch.device | str = "cpu"
    ) -> Stats:
        """Of no rows, with the statistics in `needs`, or all. Raises ElastiqError for one that does not exist."""
        known = Statistic.registry
        if unknown := sorted(set(needs or ()) - set(known)):
            raise ElastiqError(f"statistics: unknown {unknown}; known: {', '.join(sorted(known))}")
        return Stats(sums={n: known[n].empty(in_features, device) for n in sorted(known if needs is None else needs)})

    def get(self, name: str) -> Tensor | None:
        """The statistic called `name`, None where it was not collected."""
        return self.sums.get(name)

    @property
    def gradients(self) -> bool:
        """Whether a statistic wants those of the outputs."""
        return any(Statistic.registry[name].gradients for name in self.sums)

    def update(self, x: Tensor, weights: Tensor | None = None, gradient: Tensor | None = None) -> None:
        """Add the rows of `x` [..., in], each weighing 1 or as `weights` [...] says (not negative).

        gradient [..., out]: what came back to the rows' outputs. Rows that are not finite, or whose weight is not, are
        dropped and counted.
        """
        x = x.detach().reshape(-1, x.shape[-1]).float()
        weights = torch.ones(len(x), device=x.device) if weights is None else weights.detach().reshape(-1).float()
        gradient = None if gradient is None else gradient.detach().reshape(len(x), -1).float()
        if not bool(torch.isfinite(x.sum() + weights.sum())):  # or the sum alone is too large
            finite = torch.isfinite(x).all(dim=1) & torch.isfinite(weights)
            self.dropped += int((~finite).sum())
            x, weights = x[finite], weights[finite]
            gradient = None if gradient is None else gradient[finite]
        if not len(x):
            return
        self.count += len(x)
        self.total += total(weights)
        rows = Rows(x, weights, gradient)
        self.sums = {name: Statistic.registry[name].add(total, rows) for name, total in self.sums.items()}

    def merge(self, other: Stats) -> Stats:
        """Statistics of both, as far as both have them. New object."""
        both = {n: Statistic.registry[n].join(t, other.sums[n]) for n, t in self.sums.items() if n in other.sums}
        return Stats(self.count + other.count, self.total + other.total, self.dropped + other.dropped, both)

    def divided(self, scale: Tensor) -> Stats:
        """Of inputs divided by `scale` [in]. New object."""
        sums = {name: Statistic.registry[name].divided(total, scale) for name, total in self.sums.items()}
        return Stats(self.count, self.total, self.dropped, sums)

    def mean_hessian(self) -> Tensor:
        """[in, in] weighted mean of x xᵀ; raises ElastiqError if it was not collected or nothing was seen."""
        hessian = self.get("hessian")
        if hessian is None or not self.total:
            raise ElastiqError("statistics: no Hessian was collected; calibrate with at least one window of text")
        return hessian / self.total

    def mean_diagonal(self, in_features: int) -> Tensor:
        """[in] weighted mean of x², all ones where nothing is known (a matrix that no token reached)."""
        diagonal, hessian = self.get("diagonal"), self.get("hessian")
        if self.total and diagonal is not None:
            return diagonal / self.total
        if self.total and hessian is not None:
            return hessian.diagonal() / self.total
        return torch.ones(in_features)
