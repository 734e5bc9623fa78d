"""Matrices whose rows or experts are read at widths of their own."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..core import ElastiqError, Width
from .nested import NestedMatrix
from .stored import StoredMatrix


class Part(NestedMatrix):
    """The rows or experts of a matrix that share a width."""


class MixedMatrix(NestedMatrix):
    """Stands where a matrix stood when each of its members, output rows or experts, has a width (MixLLM, 2412.14590,
    gives 8 bits to the rows that matter and 4 to the others).

    Members of one width lie together, in as many planes as they are read in, so that products read contiguous planes;
    `_order` holds where each member is among them. widths: a digit for each. They stand for good: other widths need
    another module (`swap.rearrange`).
    """

    _order: Tensor

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype, widths: str) -> None:
        super().__init__(stored, dtype)
        self._widths = widths
        self._members = {
            int(width): torch.tensor([member for member, digit in enumerate(widths) if digit == width], device="cpu")
            for width in sorted(set(widths))
        }
        order = torch.argsort(torch.cat(list(self._members.values()))).int()
        self.register_buffer("_order", order.to(self._like.device), persistent=False)
        self.parts = nn.ModuleList(Part(stored.some(len(members)), dtype) for members in self._members.values())

    @property
    def bits(self) -> Width:
        """The digits. Setting anything else raises ElastiqError."""
        return self._widths

    @bits.setter
    def bits(self, bits: Width) -> None:
        if bits != self._widths:
            raise ElastiqError(
                f"{self.stored.name}: its rows or experts are held at widths of their own; use elastiq.set_bits, which "
                "reads the planes again"
            )
        for part, width in zip(self._parts(), self._members, strict=True):
            part.bits = width

    def hold(self, arrays: dict[str, Tensor]) -> None:
        """Take the arrays of the next plane; members that are read in fewer planes leave it out."""
        self._planes += 1
        for part, (width, members) in zip(self._parts(), self._members.items(), strict=True):
            if width >= self._planes:
                part.hold({name: array[members] for name, array in arrays.items()})

    def arrays(self) -> dict[str, Tensor]:
        raise ElastiqError(
            f"{self.stored.name}: its rows or experts hold planes of several widths; use elastiq.set_bits with one "
            "width for each matrix before it is saved"
        )

    def dense(self, index: Tensor | int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of the whole matrix, or of the members that `index` picks."""
        whole = torch.cat([part.dense(dtype=dtype) for part in self._parts()])
        return whole.index_select(0, self._order) if index is None else whole[self._order[index]]

    def read_arrays(self) -> list[Tensor]:
        return [array for part in self._parts() for array in part.read_arrays()]

    def extra_repr(self) -> str:
        counts = {width: len(members) for width, members in self._members.items()}
        return f"{'x'.join(map(str, self.stored.shape))}, members by width={counts}"

    def _parts(self) -> list[Part]:
        return [cast(Part, part) for part in self.parts]


class MixedLinear(MixedMatrix):
    """A linear layer whose output rows have widths of their own. bias: [out] or None."""

    bias: nn.Parameter | None

    def __init__(self, stored: StoredMatrix, bias: nn.Parameter | None, dtype: torch.dtype, widths: str) -> None:
        super().__init__(stored, dtype, widths)
        self.in_features = stored.in_features
        self.out_features = stored.out_features
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in], in the dtype of x."""
        out = torch.cat([part.product(x, None) for part in self._parts()], dim=-1).index_select(-1, self._order)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class MixedExperts(MixedMatrix):
    """A fused tensor whose experts have widths of their own; indexing decodes one expert."""

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype, widths: str) -> None:
        super().__init__(stored, dtype, widths)
        self._places = {
            int(expert): (part, place)
            for part, members in enumerate(self._members.values())
            for place, expert in enumerate(members)
        }

    def __len__(self) -> int:
        return self.stored.shape[0]

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[out, in] or [in, out] of one expert, in `dtype`."""
        part, place = self._places[int(expert)]
        values = self._parts()[part].dense(place, self.dtype)
        return values.T if self.stored.transposed else values
