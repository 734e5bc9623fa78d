"""The residual stream rotated once and for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core import Edit, Edits, ResidualStream, Rewrite
from ..parts import Hadamard


@dataclass(frozen=True)
class ResidualRotation(Rewrite, name="residual-rotation"):
    """Rotates hidden states by a random Hadamard matrix in the weights that write and read them; running costs no more.

    QuaRot (2404.00456), section 4, stages 1a and 1b, and SpinQuant (2405.16406), section 3.1, R1 and R2, without
    learning: the gains of norms go into the columns of what reads them, the stream is rotated as a whole, and values by
    one rotation per head, undone by the output projection. What differs: QuaRot rotates hidden states inside the
    feed-forward part and keys online, which is a transform's and a cache's work here; a width that is no power of two
    has a Hartley matrix for the odd part.

    heads: whether values are rotated. seed: of the signs.
    """

    heads: bool = True
    seed: int = 0

    def plan(self, stream: ResidualStream) -> Edits:
        generator = torch.Generator().manual_seed(self.seed)
        whole = _random(stream.width, generator)
        edits: dict[str, dict[str, Any]] = {stream.embedding: {"inputs": whole}}
        for norm in stream.norms:
            for name in norm.readers:
                edits.setdefault(name, {}).update(inputs=whole, gain=norm.weight, offset=norm.offset)
            if norm.weight is not None:
                edits[norm.weight] = {"value": 1.0 - norm.offset}
        for name in stream.writers:
            edits.setdefault(name, {}).update(outputs=whole)
        for heads in stream.heads if self.heads else ():
            turn = _random(heads.size, generator)
            for name in (heads.values, heads.values.removesuffix("weight") + "bias"):
                edits.setdefault(name, {}).update(outputs=turn)
            edits.setdefault(heads.output, {}).update(inputs=turn)
        return {name: Edit(transposed=name in stream.transposed, **what) for name, what in edits.items()}


def _random(size: int, generator: torch.Generator) -> Hadamard:
    return Hadamard.of(torch.rand(size, generator=generator) < 0.5)
