"""Terms that stand beside codes: single weights, whole channels, a low rank, a shift of the output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import Kept, SideTerm, to_half
from ..linalg import pack_planes, unpack_planes


@dataclass(frozen=True)
class Sparse(SideTerm, kind="sparse"):
    """Single weights apart, row by row.

    where: bool [out, in]. values: in row order, float16, or int8 with `scale` float16 [out]. Their places are stored as
    16-bit column numbers and counts per row, or as one bit per weight, whichever is smaller.
    """

    where: Tensor
    values: Tensor
    scale: Tensor | None = None

    def dense(self, level: int) -> Tensor:
        whole = torch.zeros(self.where.shape, device=self.values.device)
        whole[self.where] = self.values.float()
        return whole if self.scale is None else whole * self.scale.float()[:, None]

    def kept(self) -> dict[str, Kept]:
        found = {"values": self.values} | ({} if self.scale is None else {"row_scale": self.scale})
        if 16 * (self.values.numel() + len(self.where)) < self.where.numel():
            columns, counts = self.where.nonzero()[:, 1], self.where.sum(1)
            found |= {"columns": columns.to(torch.int16), "counts": counts.to(torch.int16)}
        else:
            found["mask"] = pack_planes(self.where.to(torch.uint8), 1)[0]
        return {name: Kept(array) for name, array in found.items()}

    def facts(self) -> dict[str, Any]:
        return {"shape": list(self.where.shape)}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        rows, width = facts["shape"]
        values = arrays["values"]
        if "mask" in arrays:
            where = unpack_planes([arrays["mask"]], width).bool()
        else:
            where = torch.zeros(rows, width, dtype=torch.bool, device=values.device)
            row = torch.arange(rows, device=values.device).repeat_interleave(arrays["counts"].long() % 2**16)
            where[row, arrays["columns"].long() % 2**16] = True
        if where.shape != (rows, width) or int(where.sum()) != values.numel():
            raise ValueError("the places of the single weights are not as many as the weights")
        return cls(where, values, arrays.get("row_scale"))


@dataclass(frozen=True)
class Channels(SideTerm, kind="channels"):
    """Whole input channels in 16 bits. index: int32 [k], ascending; columns: float16 [out, k]."""

    index: Tensor
    columns: Tensor
    in_features: int

    def dense(self, level: int) -> Tensor:
        whole = torch.zeros(len(self.columns), self.in_features, device=self.columns.device)
        whole[:, self.index.long()] = self.columns.float()
        return whole

    def product(self, x: Tensor, level: int) -> Tensor:
        return F.linear(x[..., self.index.long()], self.columns.to(x.dtype))

    def kept(self) -> dict[str, Kept]:
        return {"index": Kept(self.index), "columns": Kept(self.columns)}

    def facts(self) -> dict[str, Any]:
        return {"in_features": self.in_features}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        return cls(arrays["index"], arrays["columns"], int(facts["in_features"]))


@dataclass(frozen=True)
class LowRank(SideTerm, kind="low-rank"):
    """left [out, rank] times right [rank, in], float16, read at one level alone (0: at every level)."""

    left: Tensor
    right: Tensor
    level: int = 0

    def dense(self, level: int) -> Tensor:
        return self._reads(level) * (self.left.float() @ self.right.float())

    def product(self, x: Tensor, level: int) -> Tensor:
        if not self._reads(level):
            return x.new_zeros(*x.shape[:-1], len(self.left))
        return F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def kept(self) -> dict[str, Kept]:
        return {"left": kept_for(self.left, self.level), "right": kept_for(self.right, self.level)}

    def facts(self) -> dict[str, Any]:
        return {"level": self.level, "shape": [len(self.left), self.right.shape[1]]}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        rows, columns = facts["shape"]
        left, right = arrays.get("left", torch.zeros(rows, 0)), arrays.get("right", torch.zeros(0, columns))
        return cls(left, right, int(facts["level"]))

    def _reads(self, level: int) -> bool:
        return self.level in (0, level)


@dataclass(frozen=True)
class Shift(SideTerm, kind="shift"):
    """A vector float16 [out] added to the output, whatever the input, at one level alone (0: at every level)."""

    amount: Tensor
    in_features: int
    level: int = 0

    def dense(self, level: int) -> Tensor:
        return torch.zeros(len(self.amount), self.in_features, device=self.amount.device)

    def product(self, x: Tensor, level: int) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(self.amount))

    def shift(self, level: int) -> Tensor | None:
        return self.amount.float() if self.level in (0, level) else None

    def kept(self) -> dict[str, Kept]:
        return {"amount": kept_for(self.amount, self.level)}

    def facts(self) -> dict[str, Any]:
        return {"level": self.level, "shape": [len(self.amount), self.in_features]}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        rows, columns = facts["shape"]
        return cls(arrays.get("amount", torch.zeros(rows)), int(columns), int(facts["level"]))


def kept_for(array: Tensor, level: int) -> Kept:
    """Stored in half precision with the plane of the level that reads it; 0 is every level."""
    return Kept(to_half(array.float()).half(), max(level, 1), (level,) if level else ())
