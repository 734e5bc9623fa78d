"""BitStack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core import ElastiqError, Format, Solver, Stats, Term, mean, to_half
from ..linalg import leading_triplets
from ..parts import Diagonal, SignStack


@dataclass(frozen=True)
class BitStack(Solver, name="bitstack"):
    """A stack of residual blocks, each the signs of what is left and its sizes to a rank (BitStack, 2410.23918,
    sections 2.1 to 2.3): level r is the first r blocks.

    Of the format only the levels count, which are 1 to n. Before the decomposition every input channel is scaled by its
    root mean square, as in the paper; the scales are divided out of each block's right factor. The paper sorts the
    blocks of all matrices by what they bring to the model; that is an allocator's level map here.
    """

    rank: int = 16

    by_rows: ClassVar[bool] = False
    serves_top_alone: ClassVar[bool] = False
    terms_by_level: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"diagonal"})

    def __post_init__(self) -> None:
        self.require_at_least(rank=1)

    def solve(self, weight: Tensor, format: Format, stats: Stats) -> tuple[Term, ...]:
        count = format.levels[-1]
        if tuple(format.levels) != tuple(range(1, count + 1)):
            raise ElastiqError(f"bitstack: levels={format.levels} must be 1 to n, one per block")
        size = stats.mean_diagonal(weight.shape[1]).to(weight.device).sqrt()
        scale = Diagonal.of((size / max(mean(size), 1e-30)).clamp(1e-3, 1e3))
        rest = weight.clone()
        signs: list[Tensor] = []
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for _ in range(count):
            sign = rest >= 0
            left, values, right = leading_triplets(scale.into(rest).abs(), self.rank)
            root = values.sqrt()
            left, right = to_half(left * root), to_half(scale.out_of(root[:, None] * right))
            rest = rest - torch.where(sign, left @ right, -(left @ right))
            signs.append(sign)
            lefts.append(left)
            rights.append(right)
        return (SignStack.of(signs, lefts, rights),)
