"""Linear layers over nested planes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .embedding import NestedEmbedding
from .nested import NestedMatrix
from .stored import StoredMatrix


class NestedLinear(NestedMatrix):
    """Stands where a linear layer stood (nn.Linear, or GPT-2's Conv1D, whose weight is stored [out, in] here too).

    bias: [out] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, stored: StoredMatrix, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__(stored, dtype)
        self.in_features = stored.in_features
        self.out_features = stored.out_features
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] of x [..., in], in the dtype of x."""
        return self.product(x, self._parameters["bias"])


class TiedHead(nn.Module):
    """Output head whose matrix is the nested embedding table; it holds no planes and follows the table's width."""

    bias: nn.Parameter | None

    def __init__(self, embedding: NestedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: the table belongs to its own place in the tree
        self.in_features = embedding.stored.in_features
        self.out_features = embedding.stored.out_features
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The table's, as `NestedMatrix.weight`."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., vocabulary] of x [..., hidden], in the dtype of x."""
        return self._embedding[0].product(x, self.bias)
