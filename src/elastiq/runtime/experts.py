"""Fused expert tensors over nested planes."""

from __future__ import annotations

from torch import Tensor

from .nested import NestedMatrix


class NestedExperts(NestedMatrix):
    """Stands where a fused parameter [experts, out, in] stood; indexing decodes one expert.

    The families' own eager forward says `linear(x, self.gate_up_proj[expert])`, so it works unchanged.
    """

    def __len__(self) -> int:
        return self.stored.shape[0]

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """[out, in] of one expert, in `dtype`."""
        return self.dense(int(expert), self.dtype)
