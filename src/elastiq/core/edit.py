"""What becomes of a parameter while it is read, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .fold import Fold


@dataclass(frozen=True)
class Edit:
    """A change of one parameter: W becomes S W diag(g) T⁻¹, g the gain, T and S the maps of its inputs and outputs.

    gain: name of the parameter (of a norm) whose values multiply the columns; `offset` is added to them first.
    inputs, outputs: maps; one of fewer channels than the parameter has works on equal pieces of them, one after the
    other. transposed: the parameter is stored [in, out]. value: all of the parameter is this number instead.
    """

    gain: str | None = None
    offset: float = 0.0
    inputs: Fold | None = None
    outputs: Fold | None = None
    transposed: bool = False
    value: float | None = None

    @property
    def changes(self) -> bool:
        return self != Edit(transposed=self.transposed)

    def apply(self, values: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter [out, in], or the bias [out], of `values`, float32; read(name) gives another parameter."""
        if self.value is not None:
            return torch.full_like(values, self.value)
        if values.dim() == 1:
            return values if self.outputs is None else _in_pieces(self.outputs.forward, values, self.outputs)
        weight = values.mT if self.transposed else values
        if self.gain is not None:
            weight = weight * (read(self.gain).float() + self.offset)
        if self.inputs is not None:
            weight = _in_pieces(self.inputs.into, weight, self.inputs)
        if self.outputs is not None:
            weight = _in_pieces(self.outputs.forward, weight.mT, self.outputs).mT
        return (weight.mT if self.transposed else weight).contiguous()


def _in_pieces(map: Callable[[Tensor], Tensor], rows: Tensor, fold: Fold) -> Tensor:
    """`map` on every piece of the rows [..., channels] that is as wide as the fold."""
    return map(rows.unflatten(-1, (-1, fold.channels())).contiguous()).flatten(-2)


@dataclass(frozen=True)
class Norm:
    """A normalisation of the residual stream and what reads it.

    weight: name of its gain, None where it has none. offset: what is added to the gain. readers: names of the
    parameters that are given its output. outer: it comes after the last block.
    """

    weight: str | None
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """Values of attention on their way: values: parameter that makes them, output: the one that is given their mixture.
    size: channels per head."""

    values: str
    output: str
    size: int


@dataclass(frozen=True)
class ResidualStream:
    """Where the stream of hidden states is begun, read and written in a model whose norms bear a rotation.

    width: channels. embedding: name of the table that begins it. norms: in order, the last one before the head.
    writers: parameters (and their biases) whose outputs are added to it. heads: of the blocks with attention.
    transposed: names of the parameters stored [in, out].
    """

    width: int
    embedding: str
    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    heads: tuple[Heads, ...]
    transposed: frozenset[str] = frozenset()


Edits = Mapping[str, Edit]
