"""The safetensors container: headers read with suspicion, files written array after array."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec, ElastiqError
from .files import write_durably
from .names import is_array_name

MAX_HEADER = 100_000_000
"""Largest header, in bytes (the container's own limit)."""

_CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """Where an array lies in its file: bytes `start` to `end`, counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def spec(self) -> ArraySpec:
        return self.dtype, self.shape


def dtype_code(dtype: torch.dtype) -> str:
    """The container's name of a type."""
    return _CODES[dtype]


def dtype_of(code: str) -> torch.dtype:
    """The type of that name. Raises KeyError for a name there is not."""
    return _DTYPES[code]


def num_bytes(spec: ArraySpec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor in row order, little endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def write_tensors(
    path: Path,
    specs: Mapping[str, ArraySpec],
    payload: Callable[[str], Iterable[Any]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a safetensors file, asking `payload` for the bytes of one array after another; {"sha256", "size"}.

    Arrays lie by falling element size, then by name, so that every array is aligned and the bytes are determined.
    """
    order = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        dtype, shape = specs[name]
        if dtype not in _CODES:
            raise ElastiqError(f"{name}: arrays of {dtype} cannot be stored; convert it to a 16-bit float")
        end = offset + num_bytes(specs[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield from payload(name)

    written = write_durably(path, chunks())
    if written["size"] != 8 + len(text) + offset:
        raise ElastiqError(
            f"{path}: the arrays written do not have the announced shapes; this is a bug, please report it"
        )
    return written


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name and the metadata of a safetensors file, checked against its size.

    Raises ElastiqError if the file is missing, cut short, or its header is not one.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or size < 8 + length <= 8 + MAX_HEADER:
                raise ElastiqError(f"{path}: cut short within its header; copy it again")
            if length > MAX_HEADER:
                raise ElastiqError(f"{path}: not a safetensors file (header of {length} bytes); copy it again")
            text = file.read(length)
    except OSError as error:
        raise ElastiqError(f"{path}: cannot be read ({error.strerror}); copy it from the original checkpoint") from None
    entries, metadata = _parse_header(path, text)
    _check_offsets(path, entries, 8 + length, size)
    return entries, metadata


def _parse_header(path: Path, text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    broken = ElastiqError(f"{path}: its header is not that of a safetensors file; copy it again")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise broken from None
    if not isinstance(header, dict):
        raise broken
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken
    entries = {}
    for name, row in header.items():
        if not is_array_name(name) or not isinstance(row, dict):
            raise broken
        dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _DTYPES or not isinstance(shape, list) or not _counts(shape):
            raise broken
        if not isinstance(offsets, list) or len(offsets) != 2 or not _counts(offsets):
            raise broken
        entries[name] = Entry(_DTYPES[dtype], tuple(shape), 8 + len(text) + offsets[0], 8 + len(text) + offsets[1])
        if num_bytes(entries[name].spec) != offsets[1] - offsets[0]:
            raise broken
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _counts(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_offsets(path: Path, entries: dict[str, Entry], position: int, size: int) -> None:
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            raise ElastiqError(f"{path}: its header is not that of a safetensors file; copy it again")
        position = entry.end
    if size < position:
        raise ElastiqError(f"{path}: cut short, {size} bytes of {position}; copy it again")
    if size > position:
        raise ElastiqError(f"{path}: {size - position} bytes longer than its header says; copy it again")
