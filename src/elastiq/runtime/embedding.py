"""An embedding table over nested planes."""

from __future__ import annotations

import torch
from torch import Tensor

from .nested import NestedMatrix
from .stored import StoredMatrix


class NestedEmbedding(NestedMatrix):
    """Stands where an embedding table [vocabulary, hidden] stood; decodes only the rows it is asked for.

    factor: what some families multiply every row by (Gemma 3, XGLM). It is a number and no buffer: transformers fills
    buffers that no file holds with what it likes.
    """

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__(stored, dtype)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        """[..., hidden] in `dtype` of token ids [...]."""
        rows = self.dense(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.factor == 1.0 else rows * torch.tensor(self.factor, dtype=self.dtype)
