"""What every export has in common: the target's one verb and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.files import json_bytes, range_chunks, spelled, write_durably
from ..checkpoint.names import CONFIG, travels_along
from ..checkpoint.tensors import read_header, tensor_bytes, write_tensors
from ..core import ArraySpec, ElastiqError, held
from ..runtime.stored import StoredMatrix
from .view import View


@dataclass(frozen=True)
class ExportedMatrix:
    """One matrix as the target holds it.

    stored_as: the target's word for its format. num_bits: of everything stored for it. source_bits: the width it was
    fitted to: its own, or the widest where the target has no grid like ours. error: squared error against that,
    relative to the squares of the matrix; 0 where it is held exactly.
    """

    name: str
    bits: int
    stored_as: str
    num_bits: int
    num_weights: int
    source_bits: int
    error: float


@dataclass
class Exported:
    """What an export wrote. arrays: every array that has to be found in it, with its shape and type, in words."""

    matrices: list[ExportedMatrix] = field(default_factory=list)
    arrays: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        return sum(m.num_bits for m in self.matrices) / sum(m.num_weights for m in self.matrices)

    @property
    def worst(self) -> ExportedMatrix:
        return max(self.matrices, key=lambda matrix: matrix.error)


class Target(ABC):
    """A foreign format. A subclass names itself and so registers itself: `class GGUF(Target, name="gguf")`.

    is_file: whether an export is one file, and not a directory.
    """

    name: ClassVar[str]
    is_file: ClassVar[bool] = False
    registry: ClassVar[dict[str, type[Target]]] = {}

    def __init_subclass__(cls, name: str | None = None) -> None:
        if name is not None:
            cls.name = name
            Target.registry[name] = cls

    @abstractmethod
    def check(self, view: View) -> None:
        """Raise ElastiqError for a model, a width or a setting that the format cannot hold; reads no weights."""

    @abstractmethod
    def write(self, view: View, path: Path) -> Exported:
        """Fill the new file or the empty directory `path`."""

    @abstractmethod
    def open(self, path: Path, view: View) -> PreTrainedModel:
        """The model of a written export of `view`, float32 and dense, decoded by other code than wrote it."""

    @abstractmethod
    def found(self, path: Path) -> dict[str, str]:
        """The arrays that are in a written export, as `Exported.arrays` has them."""


def dense_model(view: View, state: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """A float32 model of the view's config.json with the parameters in `state`; tied ones may be left out.

    Raises ElastiqError if one is missing, strange or of another shape.
    """
    config = AutoConfig.for_model(**view.config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    given = {name: tensor.float() for name, tensor in state}
    result = model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or result.unexpected_keys:
        raise ElastiqError(f"{(missing or result.unexpected_keys)[0]} is missing from what was written, or strange")
    return cast(PreTrainedModel, model.eval())


def relative_error(wanted: Tensor, held: Tensor) -> float:
    """Squared error of `held` relative to the squares of `wanted`."""
    energy = float(wanted.square().sum())
    return float((held - wanted).square().sum()) / energy if energy else 0.0


def require_rows_held(target: str, stored: StoredMatrix, bits: int, error: float) -> None:
    """Raise ElastiqError where the scales of a target lose what the powers of two of a matrix's rows say: `error`, what
    it adds relative to the matrix, is then beyond what rounding to `bits` does."""
    if len(stored.parts) > len(stored.inner_parts) and not error <= 8 * 4.0**-bits:
        raise ElastiqError(
            f"{target}: {stored.name} has rows too small or too large for half-precision scales (an error of "
            f"{error:.2g}); export to hf"
        )


def held_dtype(view: View, stored: StoredMatrix, dtype: torch.dtype) -> torch.dtype:
    """Of the matrix in 16 bits: `dtype`, or bfloat16 where that is float16 and cannot hold it."""
    return held(view.dense(stored.name), dtype).dtype if stored.parts and dtype == torch.float16 else dtype


def side_files(view: View) -> list[str]:
    """Names of the files that go along: tokenizer, templates, generation settings, licence."""
    return sorted(file.name for file in view.reader.path.iterdir() if travels_along(file.name) and file.is_file())


def write_directory(
    view: View,
    path: Path,
    specs: Mapping[str, ArraySpec],
    payload: Callable[[str], Iterable[Tensor]],
    config: Mapping[str, Any],
) -> Exported:
    """A model directory of one safetensors file with the arrays of `specs`, config.json and the side files."""
    write_tensors(path / "model.safetensors", specs, lambda name: map(tensor_bytes, payload(name)))
    write_durably(path / CONFIG, [json_bytes(spelled(dict(config)), CONFIG)])
    for name in side_files(view):
        source = view.reader.path / name
        write_durably(path / name, range_chunks(source, 0, source.stat().st_size))
    return Exported(arrays={name: f"{dtype} {list(shape)}" for name, (dtype, shape) in specs.items()})


def directory_arrays(path: Path) -> dict[str, str]:
    """Arrays of a directory that `write_directory` made."""
    entries, _ = read_header(path / "model.safetensors")
    return {name: f"{entry.dtype} {list(entry.shape)}" for name, entry in entries.items()}
