"""Terms that stand beside codes: single weights, whole channels, a low rank, a shift of the output."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import Kept, SideTerm, to_half
from ..linalg import pack_planes, unpack_planes


@dataclass(frozen=True)
class Sparse(SideTerm, kind="sparse"):
    """Single weights apart, row by row.

    columns: int64 [n], where they are; counts: int64 [out], how many a row has. values: [n], float16, or int8 with
    `scale` float16 [out]. Their places are stored as 16-bit column numbers and counts per row, or as one bit per
    weight, whichever is smaller.
    """

    columns: Tensor
    counts: Tensor
    values: Tensor
    in_features: int
    scale: Tensor | None = None

    @classmethod
    def at(cls, where: Tensor, values: Tensor, scale: Tensor | None = None) -> Self:
        """In the places of `where`, bool [out, in]; values [n] in row order."""
        return cls(where.nonzero()[:, 1], where.sum(1), values, where.shape[1], scale)

    def dense(self, level: int) -> Tensor:
        whole = torch.zeros(len(self.counts), self.in_features, device=self.values.device)
        whole[self._rows, self.columns] = self.values.float()
        return whole if self.scale is None else whole * self.scale.float()[:, None]

    def product(self, x: Tensor, level: int) -> Tensor:
        if torch.compiler.is_compiling():
            return super().product(x, level)
        _hear_the_warning()
        starts = F.pad(self.counts.cumsum(0), (1, 0))
        size = (len(self.counts), self.in_features)
        matrix = torch.sparse_csr_tensor(starts, self.columns, self.values.float(), size)
        y = torch.sparse.mm(matrix, x.reshape(-1, self.in_features).float().T).T
        if self.scale is not None:
            y = y * self.scale.float()
        return y.to(x.dtype).view(*x.shape[:-1], len(self.counts))

    def kept(self) -> dict[str, Kept]:
        found = {"values": self.values} | ({} if self.scale is None else {"row_scale": self.scale})
        if 16 * (self.values.numel() + len(self.counts)) < len(self.counts) * self.in_features:
            found |= {"columns": self.columns.to(torch.int16), "counts": self.counts.to(torch.int16)}
        else:
            where = torch.zeros(len(self.counts), self.in_features, dtype=torch.uint8, device=self.values.device)
            where[self._rows, self.columns] = 1
            found["mask"] = pack_planes(where, 1)[0]
        return {name: Kept(array) for name, array in found.items()}

    def facts(self) -> dict[str, Any]:
        return {"shape": [len(self.counts), self.in_features]}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        rows, width = facts["shape"]
        values, scale = arrays["values"], arrays.get("row_scale")
        if "mask" in arrays:
            apart = cls.at(unpack_planes([arrays["mask"]], width).bool(), values, scale)
        else:
            columns, counts = (arrays[name].long() % 2**16 for name in ("columns", "counts"))
            apart = cls(columns, counts, values, width, scale)
        if len(apart.counts) != rows or not int(apart.counts.sum()) == len(apart.columns) == values.numel():
            raise ValueError("the places of the single weights are not as many as the weights")
        if len(apart.columns) and int(apart.columns.max()) >= width:
            raise ValueError("a single weight stands beyond the end of its row")
        return apart

    @property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)


@cache
def _hear_the_warning() -> None:
    """torch says once that compressed rows are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.long), torch.empty(0), (1, 1))


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
        amount = arrays["amount"] if "amount" in arrays else torch.zeros(rows)
        return cls(amount, int(columns), int(facts["level"]))


def kept_for(array: Tensor, level: int) -> Kept:
    """Stored in half precision with the plane of the level that reads it; 0 is every level."""
    return Kept(to_half(array.float()).half(), max(level, 1), (level,) if level else ())
