"""Random Hadamard rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import Fold, Format, Stats, Transform
from ..parts import Hadamard


@dataclass(frozen=True)
class RandomHadamard(Transform, name="hadamard"):
    """Spreads outliers over all channels by a Hadamard matrix with random signs (QuaRot, 2404.00456, section 4; QuIP#,
    2402.04396, section 3).

    The rotation stays at the matrix's input and is undone by the weight. QuaRot rotates the residual stream instead,
    which saves the work at run time, but has to take the norms' gains into the weights first: a rotated residual stream
    was worse than none on SmolLM2 at 3 bits and more (benchmarks/results.md). Sizes that are not powers of two take a
    Hartley matrix for the odd part, where QuaRot looks up known Hadamard matrices.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def plan(self, consumers: Sequence[Tensor], stats: Stats, format: Format) -> Fold:
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.rand(consumers[0].shape[1], generator=generator) < 0.5
        return Hadamard.of(signs.to(consumers[0].device))
