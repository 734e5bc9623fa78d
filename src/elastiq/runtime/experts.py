"""Fused expert tensors over nested planes."""

from __future__ import annotations

from torch import Tensor

from .nested import NestedMatrix


class NestedExperts(NestedMatrix):
    """Stands where a fused parameter [experts, out, in] or [experts, in, out] stood; indexing decodes one expert.

    The families' own eager forward says `linear(x, self.gate_up_proj[expert])`, or `x @ self.gate_up_proj[expert]`, so
    it works unchanged.
    """

    def __len__(self) -> int:
        return self.stored.shape[0]

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[out, in] or [in, out] of one expert, in `dtype`."""
        values = self.dense(int(expert), self.dtype)
        return values.T if self.stored.transposed else values
