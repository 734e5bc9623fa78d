"""Files from outside, cut short or with flipped bits: read as something whole, or refused in one sentence."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_checkpoint import write_random, write_small
from safetensors.torch import load_file, save_file
from tiny import build_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from elastiq import ElastiqError
from elastiq.checkpoint import CheckpointReader
from elastiq.foreign.exporting import GGUF, AWQDirectory, CompressedTensors, GPTQDirectory, export
from elastiq.foreign.importing import import_model
from elastiq.foreign.integer import Packed

MOST_MEMORY = 512 << 10
"""KiB by which no file of a few kilobytes may make this process grow."""
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def damage(content: bytes, data: st.DataObject) -> bytes:
    changed = bytearray(content)
    if data.draw(st.integers(0, 3)) == 0:
        del changed[data.draw(st.integers(0, len(changed) - 1)) :]
    for _ in range(data.draw(st.integers(0, 6))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(changed)


def packed_layers() -> dict[str, tuple[dict[str, Tensor], dict[str, object]]]:
    """Arrays of one layer [32, 64], and the settings, of every method."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8)
    zero = torch.randint(1, 16, (32, 2), generator=generator, dtype=torch.uint8)
    packed = Packed(codes, torch.rand(32, 2, generator=generator), zero, 4, 32)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [32, 64], "nested_blocksize": 256, "nested_offset": 0.1}
    nf4 = {
        "weight": torch.randint(0, 256, (1024, 1), generator=generator, dtype=torch.uint8),
        "weight.absmax": torch.randint(0, 256, (32,), generator=generator, dtype=torch.uint8),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": torch.ones(1),
        "weight.nested_quant_map": torch.rand(256, generator=generator),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return {
        "gptq": (GPTQDirectory().pack(packed), {"bits": 4}),
        "awq": (AWQDirectory().pack(packed), {"bits": 4, "version": "gemm"}),
        "compressed-tensors": (CompressedTensors(asymmetric=True).pack(packed), {"format": "pack-quantized"}),
        "bitsandbytes": (nf4, {"load_in_4bit": True}),
    }


@pytest.mark.parametrize("method", packed_layers())
@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_packed_directories(method: str, tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path)
    (tmp_path / "packed").mkdir(parents=True)
    arrays, own = packed_layers()[method]
    save_file(
        {f"a.{k}": v.contiguous() for k, v in arrays.items()} | {"b.weight": torch.ones(3)},
        tmp_path / "packed/model.safetensors",
    )
    config = {"model_type": "llama", "quantization_config": {"quant_method": method, **own}}
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    victim = tmp_path / "packed" / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    victim.write_bytes(damage(victim.read_bytes(), data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        import_model(tmp_path / "packed", tmp_path / "out")
    except ElastiqError as error:
        assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    else:
        assert all(value.isfinite().all() for name, value in load_file(tmp_path / "out/model.safetensors").items()
                   if name == "a.weight")  # fmt: skip
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    directory = tmp_path_factory.mktemp("gguf")
    write_random(build_model("llama"), tiny_model("llama"), directory / "nested", levels=(4, 8))
    export(directory / "nested", directory / "model.gguf", GGUF("Q4_1"), 4)
    return directory / "model.gguf"


@settings(max_examples=25, **SETTINGS)
@given(data=st.data())
def test_gguf_to_its_end(gguf_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Beyond the header: through the reader of transformers to a directory that loads."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / "model.gguf").write_bytes(damage(gguf_file.read_bytes(), data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        import_model(tmp_path / "model.gguf", tmp_path / "out")
    except ElastiqError as error:
        assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    else:
        assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY


@pytest.mark.parametrize("key", [b"llama.embedding_length", b"llama.block_count"])
def test_gguf_that_does_not_say_its_size(gguf_file: Path, tmp_path: Path, key: bytes) -> None:
    """transformers would build a model of 4096 channels instead."""
    (tmp_path / "model.gguf").write_bytes(gguf_file.read_bytes().replace(key, key[:-1] + b"?"))
    with pytest.raises(ElastiqError, match=r"is 'missing' in its metadata and \d+ by its tensors"):
        import_model(tmp_path / "model.gguf", tmp_path / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "nested")


@settings(max_examples=100, **SETTINGS)
@given(data=st.data())
def test_nested_directories(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Damaged files of our own, with checksums and without looking at them."""
    path = tmp_path / "nested"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(small, path)
    victim = path / data.draw(st.sampled_from(sorted(file.name for file in small.iterdir())))
    content = victim.read_bytes()
    victim.write_bytes(damage(content, data))
    before, verify = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, data.draw(st.booleans())
    try:
        reader = CheckpointReader(path, verify=verify)
        read = dict(reader.base())
        read |= {name: reader.read(name, reader.available[-1]) for name in reader.manifest.matrices}
        assert read and reader.table is not None and reader.recipe is not None
    except ElastiqError as error:
        assert "\n" not in str(error)
        assert victim.read_bytes() != content
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
