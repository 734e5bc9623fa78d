"""The safetensors container, written and read by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from elastiq.checkpoint.tensors import read_header, tensor_bytes, write_tensors
from elastiq.core import ElastiqError

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, specs, lambda name: [tensor_bytes(tensors[name])])


tensor_sets = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_.]{0,8}", fullmatch=True),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(specs=tensor_sets, seed=st.integers(0, 1000))
def test_files_are_those_of_the_library(tmp_path_factory: pytest.TempPathFactory, specs: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8).to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    directory = tmp_path_factory.mktemp("container")
    path, again, theirs = directory / "ours", directory / "again", directory / "theirs"
    written = write(path, tensors)
    write(again, dict(reversed(tensors.items())))
    assert path.read_bytes() == again.read_bytes()
    assert written["size"] == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    save_file(tensors, theirs, metadata={"format": "pt"})
    for source in (path, theirs):
        entries, metadata = read_header(source)
        assert metadata == {"format": "pt"}
        assert {name: entry.spec for name, entry in entries.items()} == {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
        }
        data = source.read_bytes()
        assert all(data[entries[n].start : entries[n].end] == bytes(tensor_bytes(t)) for n, t in tensors.items())


def test_arrays_are_aligned(tmp_path: Path) -> None:
    write(tmp_path / "f", {"b": torch.ones(3, dtype=torch.uint8), "a": torch.ones(5).half(), "c": torch.ones(1)})
    entries, _ = read_header(tmp_path / "f")
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def raw(header: object, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) + pad) + text + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
NOT_ONE = "its header is not that of a safetensors file; copy it again"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "cut short within its header; copy it again"),
        (b"\1\0", "cut short within its header; copy it again"),
        (raw({"a": ONE}, pad=50), "cut short within its header; copy it again"),
        (struct.pack("<Q", 2**62) + b"{}", "not a safetensors file (header of 4611686018427387904 bytes)"),
        (raw({"a": ONE}, b"abc"), "cut short, 71 bytes of 72; copy it again"),
        (raw({"a": ONE}, b"abcde"), "1 bytes longer than its header says; copy it again"),
        (raw(b"\xff\xfe"), NOT_ONE),
        (raw(b"[" * 100_000), NOT_ONE),
        (raw([1]), NOT_ONE),
        (raw({"a": 5}), NOT_ONE),
        (raw({"__metadata__": {"x": 1}}), NOT_ONE),
        (raw({"a": {**ONE, "dtype": "PICKLE"}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "dtype": ["U8"]}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "shape": [-4]}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "shape": [True, 4]}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "shape": [2**40, 2**40]}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "shape": "4"}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "data_offsets": [0, 4, 8]}}, b"abcd"), NOT_ONE),
        (raw({"a": {**ONE, "data_offsets": [4, 8]}}, b"abcdabcd"), NOT_ONE),
        (raw({"a": ONE, "b": ONE}, b"abcd"), NOT_ONE),
        (raw({"../a": ONE}, b"abcd"), NOT_ONE),
        (raw(b'{"a":1,"a":2}'), NOT_ONE),
    ],
)
def test_broken_headers(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "plane-1.safetensors"
    path.write_bytes(content)
    with pytest.raises(ElastiqError) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")


def test_types_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match=r"arrays of torch.complex64 cannot be stored"):
        write(tmp_path / "f", {"a": torch.ones(2, dtype=torch.complex64)})
