"""An embedding table over nested planes."""

from __future__ import annotations

import torch
from torch import Tensor

from .nested import NestedMatrix
from .stored import StoredMatrix


class NestedEmbedding(NestedMatrix):
    """Stands where an embedding table [vocabulary, hidden] stood; decodes only the rows it is asked for.

    embed_scale: factor that some families apply to every row (Gemma 3), None for none.
    """

    embed_scale: Tensor | None

    def __init__(self, stored: StoredMatrix, dtype: torch.dtype, embed_scale: Tensor | None = None) -> None:
        super().__init__(stored, dtype)
        self.num_embeddings, self.embedding_dim = stored.shape
        self.register_buffer("embed_scale", embed_scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., hidden] in `dtype` of token ids [...]."""
        rows = self.dense(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(self.dtype)
