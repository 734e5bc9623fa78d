"""An ordinary model directory in 16 bits: every matrix as its level says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..core import ArraySpec, ElastiqError
from ..runtime.stored import StoredMatrix
from .target import Exported, ExportedMatrix, Target, directory_arrays, held_dtype, relative_error, write_directory
from .view import View


@dataclass(frozen=True)
class HuggingFace(Target, name="hf"):
    """Dequantized weights. exact: refuse where 16 bits round what a level says, which they mostly do."""

    exact: bool = False

    def check(self, view: View) -> None:
        """Raises ElastiqError for a model whose matrices add a vector to their outputs."""
        if any(part.kind == "shift" for stored in view.matrices.values() for part in stored.parts):
            raise ElastiqError("hf: a bias correction has no place in this model's files; quantize without it")

    def write(self, view: View, path: Path) -> Exported:
        dtype = _dtype(view)
        weights = {_parameter(stored): stored for stored in view.matrices.values()}
        specs: dict[str, ArraySpec] = dict(view.reader.base_specs)
        specs |= {name: (held_dtype(view, stored, dtype), _shape(stored)) for name, stored in weights.items()}
        base = dict(view.base())
        rows: list[ExportedMatrix] = []

        def payload(name: str) -> Iterator[Tensor]:
            if name in base:
                yield base[name]
                return
            stored = weights[name]
            values = view.dense(stored.name)
            dtype = specs[name][0]
            held = values.to(dtype)
            width = view.widths[stored.name]
            error = relative_error(values, held.float())
            if self.exact and error:
                raise ElastiqError(f"hf: {stored.name} at {width} bits is rounded by 16-bit floats; leave --exact out")
            rows.append(ExportedMatrix(stored.name, width, str(dtype), 16 * held.numel(), held.numel(), width, error))
            yield held.mT if stored.transposed else held

        done = write_directory(view, path, specs, payload, view.config)
        done.matrices.extend(rows)
        return done

    def open(self, path: Path, view: View) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        return model

    def found(self, path: Path) -> dict[str, str]:
        return directory_arrays(path)


def _dtype(view: View) -> torch.dtype:
    named = view.config.get("dtype") or view.config.get("torch_dtype")
    return torch.bfloat16 if named == "bfloat16" else torch.float16


def _parameter(stored: StoredMatrix) -> str:
    return stored.name if stored.fused else f"{stored.name}.weight"


def _shape(stored: StoredMatrix) -> tuple[int, ...]:
    *experts, rows, columns = stored.shape
    return (*experts, columns, rows) if stored.transposed else stored.shape
