"""A stack of signs with low-rank magnitudes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..core import MAX_BITS, Kept, SideTerm
from ..linalg import pack_planes, unpack_planes


@dataclass(frozen=True)
class SignStack(SideTerm, kind="signs"):
    """Sum over the blocks up to a level of sign ⊙ (left right): one bit per weight and a few numbers per row.

    signs: uint8 planes [out, ceil(in / 8)], a set bit is +1. left, right: float16 [out, rank] and [rank, in]. Block r
    travels with plane r, so dropping planes drops the least important blocks.
    """

    levels: tuple[int, ...]
    in_features: int
    signs: Sequence[Tensor]
    left: Sequence[Tensor]
    right: Sequence[Tensor]

    @staticmethod
    def of(signs: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor]) -> SignStack:
        """From signs bool [out, in] of every block."""
        planes = [pack_planes(sign.to(torch.uint8), 1)[0] for sign in signs]
        halves = [[x.half() for x in each] for each in (left, right)]
        return SignStack(tuple(range(1, len(planes) + 1)), signs[0].shape[1], planes, *halves)

    def dense(self, level: int) -> Tensor:
        total = torch.zeros(len(self.signs[0]), self.in_features, device=self.signs[0].device)
        for sign, left, right in list(zip(self.signs, self.left, self.right, strict=True))[:level]:
            plus = unpack_planes([sign], self.in_features).bool()
            size = left.float() @ right.float()
            total += torch.where(plus, size, -size)
        return total

    def kept(self) -> dict[str, Kept]:
        found = {}
        for level, (sign, left, right) in enumerate(zip(self.signs, self.left, self.right, strict=True), start=1):
            found["weight" if level == 1 else f"plane_{level}"] = Kept(sign, level)
            found |= {f"left_{level}": Kept(left, level), f"right_{level}": Kept(right, level)}
        return found

    def facts(self) -> dict[str, Any]:
        return {"blocks": len(self.signs), "in_features": self.in_features}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        blocks, width = int(facts["blocks"]), int(facts["in_features"])
        if not 1 <= blocks <= MAX_BITS:
            raise ValueError(f"{blocks} blocks")
        held = [n for n in range(1, blocks + 1) if f"left_{n}" in arrays]
        signs = [arrays["weight" if n == 1 else f"plane_{n}"] for n in held]
        parts = ([arrays[f"{side}_{n}"] for n in held] for side in ("left", "right"))
        return cls(tuple(range(1, blocks + 1)), width, signs, *parts)
