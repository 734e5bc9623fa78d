"""A matrix of a model: where it is and what feeds it."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("linear", "conv1d", "expert", "expert_transposed", "embedding", "head")
"""Kinds of matrices: an nn.Linear; GPT-2's, whose module stores [in, out]; one of a fused tensor [experts, out, in];
one of a fused tensor [experts, in, out] (GPT-OSS); the table of the input embedding; an output head of its own."""
TRANSPOSED = ("conv1d", "expert_transposed")
"""Those that the model stores [in, out]; in a checkpoint every matrix is [out, in]."""
FUSED = ("expert", "expert_transposed")
"""Those of which several are one tensor."""


@dataclass(frozen=True)
class Site:
    """One quantizable matrix.

    name: of the module that owns the weight (`model.layers.0.mlp.up_proj`); of a matrix inside a fused expert tensor,
        the parameter's name and the expert (`model.layers.0.mlp.experts.gate_up_proj.3`).
    role: one of ROLES.
    shape: (out_features, in_features), always in this order.
    block: index of the decoder block; -1 outside the blocks.
    input_id: sites with one input_id read the same activations and share statistics.
    expert: index along the first axis of the fused tensor, None otherwise.
    """

    name: str
    role: str
    shape: tuple[int, int]
    block: int
    input_id: str
    expert: int | None = None

    @property
    def tensor(self) -> str:
        """Name of the array in a checkpoint: all experts of one fused tensor share it."""
        return self.name.rsplit(".", 1)[0] if self.expert is not None else self.name

    @property
    def transposed(self) -> bool:
        """Whether the model stores it [in, out]."""
        return self.role in TRANSPOSED

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]
