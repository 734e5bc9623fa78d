"""A GGUF file as an ordinary 16-bit model directory."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...checkpoint.publish import write_aside
from ...core import ElastiqError, held
from ..read_back import REMEDY, read_back, shown, silently
from ..target import relative_error
from .families import FAMILIES
from .hyperparameters import ROTATION_ARRAYS, check_configuration, configured, plain_value

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]

_MAGIC = b"GGUF"
_MOST_ENTRIES = 1 << 20
_MOST_SIZE = 1 << 31
_MOST_VALUES = 1 << 12
"""Length of an array of metadata beyond which it is no hyperparameter."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each plain type of metadata."""
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFHeader:
    """metadata: by key plain values, strings, tuples of plain values, of longer and other arrays their length.

    shapes: of every tensor, rows first.
    """

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def import_gguf(file: str | Path, output: str | Path) -> None:
    """Write the model and the tokenizer of a GGUF file to the new directory `output`, dequantized to 16 bits.

    All block types that the package gguf decodes are read, for the families whose names transformers knows. What was
    written is read again and compared with every hyperparameter and every array of the file. Raises ElastiqError for a
    file that is damaged, not GGUF, of a family that is not known, or that holds what would not be used; `output`
    appears whole or not.
    """
    file = Path(file)
    if gguf is None:
        raise ElastiqError("gguf: the package gguf is not installed; run pip install 'elastiq[gguf]'")
    header = check_gguf(file)
    write_aside(Path(output), False, lambda work: _convert(file, header, work))


def check_gguf(file: Path) -> GGUFHeader:
    """The header of a GGUF file, whose every length and offset lies within the file and whose sizes agree.

    Raises ElastiqError otherwise. What comes after may trust the file not to make it allocate more than it holds.
    """
    try:
        with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Cursor(file, data).header()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is empty"
        raise ElastiqError(f"{file}: cannot be read ({reason}); give a GGUF file") from None
    _check_sizes(file, header)
    return header


class _Cursor:
    """Reads a header front to back, never past the end of the file."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0

    def header(self) -> GGUFHeader:
        if self.take(4) != _MAGIC:
            raise ElastiqError(f"{self.file}: not a GGUF file; give one, or a model directory")
        version = self.number("I")
        if version not in (2, 3):
            raise ElastiqError(f"{self.file}: GGUF version {version} is not read, only 2 and 3; convert it again")
        tensors, entries = self.count(), self.count()
        metadata = {self.string(): self.value(self.number("I")) for _ in range(entries)}
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
            raise self.broken()
        start = -(-self.at // alignment) * alignment
        for _, _, offset, size in found:
            if start + offset + size > len(self.data):
                raise ElastiqError(f"{self.file}: cut short, its tensors end beyond the file; copy it again")
        shapes = {name: shape for name, shape, _, _ in found}
        if len(shapes) != len(found):
            raise self.broken()
        return GGUFHeader(metadata, shapes)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ElastiqError(f"{self.file}: cut short within its header; copy it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def count(self) -> int:
        count = self.number("Q")
        if count > _MOST_ENTRIES:
            raise self.broken()
        return int(count)

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            member, length = self.number("I"), self.number("Q")
            if member in _SIZES:
                content = self.take(length * _SIZES[member])
                return struct.unpack(f"<{length}{_FORMATS[member]}", content) if length <= _MOST_VALUES else length
            if member == _STRING and length <= len(self.data):
                for _ in range(length):
                    self.take(self.number("Q"))
            else:
                raise self.broken()
            return length
        if kind not in _FORMATS:
            raise self.broken()
        return self.number(_FORMATS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, offset, bytes)."""
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= 4:
            raise self.broken()
        shape = tuple(reversed([int(self.number("Q")) for _ in range(axes)]))
        kind, offset = self.number("I"), self.number("Q")
        try:
            block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ElastiqError(f"{self.file}: {name} is of type {kind}, which the package gguf lacks") from None
        if not all(1 <= size < _MOST_SIZE for size in shape) or shape[-1] % block:
            raise ElastiqError(f"{self.file}: {name} of {list(shape)} is no whole number of blocks of {block}")
        return name, shape, int(offset), math.prod(shape) // block * num_bytes

    def broken(self) -> ElastiqError:
        return ElastiqError(f"{self.file}: its header is not that of a GGUF file; copy it again")


def _check_sizes(file: Path, header: GGUFHeader) -> None:
    """The sizes that a model is built with are those of the tensors that are there: what is not said, others guess."""
    architecture = header.metadata.get("general.architecture")
    table = header.shapes.get("token_embd.weight")
    if not isinstance(architecture, str) or table is None or len(table) != 2:
        raise ElastiqError(f"{file}: it holds no language model (no architecture, or no token_embd.weight)")
    blocks = {int(m.group(1)) for name in header.shapes if (m := re.match(r"blk\.(\d{1,9})\.", name))}
    agreed = {
        "block_count": len(blocks),
        "embedding_length": table[1],
        "vocab_size": table[0],
    }
    for key, size in agreed.items():
        said = header.metadata.get(f"{architecture}.{key}", size if key == "vocab_size" else "missing")
        if said != size:
            raise ElastiqError(f"{file}: {key} is {said!r} in its metadata and {size} by its tensors; copy it again")
    for key, most in (("attention.head_count", table[1]), ("attention.head_count_kv", table[1]),
                      ("feed_forward_length", 64 * table[1]), ("attention.key_length", 64 * table[1]),
                      ("expert_count", 1 << 12), ("context_length", _MOST_SIZE)):  # fmt: skip
        said = header.metadata.get(f"{architecture}.{key}", 1)
        if type(said) is not int or not 1 <= said <= most:
            raise ElastiqError(f"{file}: {key} is {said!r} in its metadata, which cannot be; copy it again")


def _convert(file: Path, header: GGUFHeader, work: Path) -> None:
    architecture = header.metadata["general.architecture"]
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ElastiqError(f"{file}: one of several parts of a model; merge them with gguf-split first")
    said = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    arrays = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    rotation = {name: _values(arrays[name]) for name in ROTATION_ARRAYS if name in arrays}
    read = silently(file, lambda: AutoConfig.from_pretrained(file.parent, gguf_file=file.name))
    config = configured(file, read, said, frozenset(header.shapes), rotation)
    _write(file, config, work)
    model = read_back(file, work, "cpu")
    check_configuration(file, model.config, {key: plain_value(value) for key, value in said.items()})
    _compare(file, architecture, arrays, model)


def _write(file: Path, config: PretrainedConfig, work: Path) -> None:
    """The model and the tokenizer, as transformers reads them with `config`, to the empty directory `work`."""
    read: Any = silently(
        file,
        lambda: AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        ),
    )
    data = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model: PreTrainedModel = type(read)(type(read.config).from_dict(data))
    silently(file, lambda: model.load_state_dict(read.state_dict()))
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ElastiqError(f"{file}: {name} holds NaN or infinite weights; copy it again")
    fits = all(held(parameter.detach(), torch.float16).dtype == torch.float16 for parameter in model.parameters())
    (model.half() if fits else model).save_pretrained(work)
    silently(file, lambda: AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)).save_pretrained(work)


def _values(tensor: Any) -> Tensor:
    """Values float32 of one array of the file."""
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()


def _compare(file: Path, architecture: str, arrays: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Hold every array of the file against what was made of it, in the arrangement of its family.

    Arrays of families whose arrangement is not known here have to be the same numbers in any order. Raises
    ElastiqError for arrays that nothing is made of, for parameters made of nothing, and for other values.
    """
    sources = _sources(architecture, arrays.keys(), model)
    unused = arrays.keys() - {name for names in sources.values() for name in names} - set(ROTATION_ARRAYS)
    if unused:
        raise ElastiqError(
            f"{file}: nothing of {type(model).__name__} takes {shown(sorted(unused))}; {REMEDY}"
        )
    for name, parameter in model.named_parameters():
        values, theirs = parameter.detach(), sources[name]
        if not theirs and not (name.endswith(".bias") and not bool(values.any())):  # without it, as with zeros
            raise ElastiqError(
                f"{file}: no array of it makes {name} of {type(model).__name__}; copy it again, or {REMEDY}"
            )
        if theirs and not _agree(model, name, values.float(), [_values(arrays[their]) for their in theirs]):
            raise ElastiqError(
                f"{file}: {', '.join(theirs)} and what transformers makes of it, {name}, hold different values; "
                + REMEDY
            )


def _sources(architecture: str, arrays: Collection[str], model: PreTrainedModel) -> dict[str, list[str]]:
    """The arrays of the file that make each parameter."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    aliases = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        theirs = [table.get_name(alias, try_suffixes=(".weight", ".bias")) for alias in aliases[id(parameter)]]
        if m := _EXPERTS.fullmatch(name):
            theirs = [f"blk.{m[1]}.ffn_{part}_exps.weight" for part in _FUSED[m[2]]]
        found[name] = [their for their in theirs if their is not None and their in arrays]
    return found


def _agree(model: PreTrainedModel, name: str, values: Tensor, arrays: list[Tensor]) -> bool:
    """Whether the values of a parameter are what the arrays say, but for the rounding to 16 bits."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        wanted, values = torch.cat([part.flatten() for part in arrays]).sort().values, values.flatten().sort().values
    else:
        wanted = family.restore(name, arrays[0], model.config.to_dict())
        owner = model.get_submodule(name.rpartition(".")[0])
        wanted = wanted.T if isinstance(owner, Conv1D) and wanted.dim() == 2 else wanted
    return wanted.shape == values.shape and relative_error(wanted, values) <= 2.0**-16


_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
_FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
