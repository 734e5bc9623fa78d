"""A loaded model and the checkpoint behind it: further planes read from it, and `save_pretrained`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader
from ..checkpoint.names import BASE, CHECKSUMS
from ..core import ElastiqError
from ..runtime import NestedMatrix, nested_matrices

log = logging.getLogger("elastiq")

_READER = "elastiq"
"""Attribute of a loaded model that holds its CheckpointReader."""


def attach(model: PreTrainedModel, reader: CheckpointReader | None) -> None:
    """Let `set_bits` read further planes of `model` from the checkpoint, and `save_pretrained` write what is loaded
    again; without a reader the model came from a directory that `save_pretrained` wrote."""
    if reader is not None:
        setattr(model, _READER, reader)
    model.save_pretrained = partial(_save, model)  # type: ignore[method-assign]  # and so are its copies and pickles


def reader_of(model: nn.Module) -> CheckpointReader | None:
    """The checkpoint behind a model, if there is one."""
    return getattr(model, _READER, None)


def hold(reader: CheckpointReader, matrices: Mapping[str, NestedMatrix], planes: Mapping[str, int]) -> int:
    """Read planes until every matrix holds as many as asked for; bytes read."""
    size = 0
    for plane in range(1, max(planes.values(), default=0) + 1):
        names = [name for name, most in planes.items() if matrices[name].max_bits < plane <= most]
        for name, arrays in reader.plane(plane, names) if names else ():
            matrices[name].hold(arrays)
            size += sum(array.nbytes for array in arrays.values())
    return size


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is saved of a model: its state, and the planes that it holds in the checkpoint's order."""
    arrays = {
        f"{name}.{key}": array
        for name, matrix in nested_matrices(model).items()
        for key, array in matrix.arrays().items()
    }
    return model.state_dict() | arrays


def saved_width(model: nn.Module) -> int | dict[str, Any]:
    """What config.json says about the width in use: one, or one by matrix."""
    widths = {name: matrix.bits for name, matrix in nested_matrices(model).items()}
    return next(iter(widths.values())) if len(set(widths.values())) == 1 else widths  # type: ignore[return-value]


def _save(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of the model's class, with planes that every loader reads.

    Into its own checkpoint, which holds all of it, nothing is written. Raises ElastiqError before anything is written
    for another checkpoint, for values that its own does not hold, and for rows or experts of several widths.
    """
    directory, reader = Path(save_directory), reader_of(model)
    matrices = nested_matrices(model)
    for matrix in matrices.values():
        matrix.arrays()  # those that cannot be saved say so
    if os.path.lexists(directory / CHECKSUMS) or os.path.lexists(directory / BASE):
        if reader is None or not directory.samefile(reader.path):
            raise ElastiqError(f"{directory}: holds a checkpoint, which saving would spoil; choose another directory")
        _require_unchanged(model, reader)
        log.warning("%s: is the checkpoint of this model and holds all of it; nothing was written", directory)
        return
    most = max(matrix.max_bits for matrix in matrices.values())
    if reader is not None:
        hold(reader, matrices, dict.fromkeys(matrices, most))
    before = getattr(model.config, "quantization_config", None)
    if before is None:
        assert reader is not None
        manifest = {**reader.manifest.to_dict(), "planes": most, "bits": saved_width(model)}
        model.config.quantization_config = manifest
        kwargs = {"state_dict": state_of(model), "save_original_format": False} | kwargs  # names stay as they are
    try:
        type(model).save_pretrained(model, directory, *args, **kwargs)
    finally:
        if before is None:
            del model.config.quantization_config


def _require_unchanged(model: Any, reader: CheckpointReader) -> None:
    """Raise ElastiqError unless a load of the checkpoint gives this model."""
    if saved_width(model) != reader.available[-1]:
        raise ElastiqError(
            f"{reader.path}: is the checkpoint itself, which is always loaded at {reader.available[-1]} bits unless "
            "others are asked for; save the widths in use into another directory"
        )
    state = model.state_dict()
    for name, stored in reader.base():
        if name in state and not torch.equal(state[name].cpu(), stored.to(state[name].dtype)):
            raise ElastiqError(
                f"{reader.path}: is the checkpoint itself and holds another {name}; save into another directory"
            )
