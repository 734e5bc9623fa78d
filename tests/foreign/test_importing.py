"""Foreign models come in as ordinary ones; damaged ones are refused in one sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_checkpoint import write_random
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

import elastiq
from elastiq import ElastiqError, embedded
from elastiq.checkpoint import CheckpointReader
from elastiq.cli import app
from elastiq.foreign.bit_stream import pack_stream
from elastiq.foreign.bitsandbytes import bitsandbytes_dense
from elastiq.foreign.compressed import compressed_dense
from elastiq.foreign.exporting import GGUF, AWQDirectory, CompressedTensors, GPTQDirectory, export
from elastiq.foreign.gguf.importing import check_gguf
from elastiq.foreign.importing import import_model, ordinary

IDS = torch.arange(40).reshape(2, 20) * 3


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model on random codes."""
    directory, source = tmp_path_factory.mktemp("importing"), embedded.model_dir()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    write_random(model, source, directory / "nested", levels=(4, 8))
    return directory / "nested"


@pytest.fixture(scope="module")
def gguf_file(nested: Path) -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed")
    export(nested, nested.parent / "model.gguf", GGUF("Q4_1"), 4)
    return nested.parent / "model.gguf"


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def expected(nested: Path) -> torch.Tensor:
    with torch.inference_mode():
        return elastiq.load(nested, 4)(input_ids=IDS, use_cache=False).logits


def test_gguf_becomes_a_directory(nested: Path, gguf_file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import", str(gguf_file), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert difference(logits(tmp_path / "out"), expected(nested)) < 5e-3


@pytest.mark.parametrize(
    "target", [GPTQDirectory(), GPTQDirectory(version=2), AWQDirectory(), CompressedTensors(asymmetric=True)]
)
def test_packed_directories(
    nested: Path, tmp_path: Path, target: GPTQDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastiq.foreign.exporting.MOST_DIFFERENT", 5.0)
    matrices = CheckpointReader(nested).manifest.matrices
    names = list(matrices)
    widths = dict.fromkeys(names, 4) | ({names[3]: 8} if not isinstance(target, AWQDirectory) else {})
    export(nested, tmp_path / "packed", target, widths)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"].pop("dynamic", None)  # widths are those of the arrays, however they are described
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    import_model(tmp_path / "packed", tmp_path / "out")
    arrays, packed = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "packed/model.safetensors")
    for name in names:
        own = {key.rpartition(".")[2]: value for key, value in packed.items() if key.startswith(f"{name}.")}
        assert torch.equal(arrays[f"{name}.weight"], target.unpack(own, matrices[name], widths[name]).half())


def test_shards_are_those_of_the_index(nested: Path, tmp_path: Path) -> None:
    """What the index names lies within the directory, is there, and holds what it promises."""
    packed = tmp_path / "packed"
    export(nested, packed, GPTQDirectory(), 4)
    index, names = packed / "model.safetensors.index.json", list(load_file(packed / "model.safetensors"))
    (packed / "model.safetensors").rename(packed / "model-1.safetensors")
    for file, message in (
        ("../model.safetensors", r"names a shard outside its directory: \.\./model\.safetensors"),
        ("model-2.safetensors", r"lacks the shard model-2\.safetensors that"),
        ("model-1.safetensors", r"model\.safetensors\.index\.json promises the tensor another, which no file holds"),
    ):
        weight_map = dict.fromkeys([*names, "another"], "model-1.safetensors") | {names[0]: file}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ElastiqError, match=message):
            import_model(packed, tmp_path / "out")
    index.unlink()
    (packed / "model-1.safetensors").rename(packed / "pytorch_model.bin")
    with pytest.raises(ElastiqError, match="holds its weights as pickle files only, which are never read"):
        import_model(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind", "double"), [("llama", "nf4", True), ("llama", "fp4", False), ("gpt2", "nf4", False)]
)
def test_bitsandbytes(tmp_path: Path, family: str, kind: str, double: bool) -> None:
    """Quantized, saved and decoded by bitsandbytes itself, whose decoder for CPUs wants rows of whole blocks."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    source = make_model(family, tmp_path / "source", **({"intermediate_size": 128} if family == "llama" else {}))
    settings_ = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, llm_int8_skip_modules=["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings_, dtype=torch.float16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "packed")
    import_model(tmp_path / "packed", tmp_path / "out")
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    layers = {n: m for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")}
    assert len(layers) == {"llama": 14, "gpt2": 8}[family]
    for name, module in layers.items():
        dense = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        found = mine.get_submodule(name).weight
        assert torch.allclose(found.T if family == "gpt2" else found, dense, atol=1e-3, rtol=1e-3)


def test_bitsandbytes_blocks_run_over_the_ends_of_rows() -> None:
    state = {"quant_type": "nf4", "blocksize": 4, "shape": [2, 3]}
    arrays = {
        "weight": torch.tensor([[0x01], [0x23], [0x45]], dtype=torch.uint8),
        "weight.absmax": torch.tensor([1.0, 10.0]),
        "weight.quant_map": torch.arange(16) / 2,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    assert bitsandbytes_dense(arrays).tolist() == [[0, 0.5, 1], [1.5, 20, 25]]


def test_quantize_takes_it_as_it_is(gguf_file: Path, tmp_path: Path) -> None:
    recipe = elastiq.recipes.rtn(levels=(4,))
    elastiq.quantize(gguf_file, tmp_path / "out", recipe, num_samples=2, seq_len=32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = elastiq.quantize(gguf_file, tmp_path / "out", recipe, num_samples=2, seq_len=32)
    assert again.already_finished
    assert CheckpointReader(tmp_path / "out").info["model"] == "model"


def test_a_second_run_leaves_the_first_alone(gguf_file: Path, tmp_path: Path) -> None:
    room = tmp_path / "out.imported"
    (room / "left by a killed run").mkdir(parents=True)
    (room / "made-by-elastiq").touch()
    with ordinary(gguf_file, tmp_path / "out") as directory:
        assert [path.name for path in room.iterdir() if path.is_dir()] == ["model"]
        with pytest.raises(ElastiqError, match="another process is writing it"), ordinary(gguf_file, tmp_path / "out"):
            pass
        assert (Path(directory) / "config.json").is_file()
    assert not room.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_gguf_headers(gguf_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Cut short or with flipped bits: read as consistent or refused, never anything else."""
    content = bytearray(gguf_file.read_bytes())
    whole = len(content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, whole - 1)) :]
    for _ in range(data.draw(st.integers(0, 6))):
        if content:
            position = data.draw(st.integers(0, min(len(content), 90_000) - 1))
            content[position] ^= 1 << data.draw(st.integers(0, 7))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(bytes(content))
    try:
        header = check_gguf(broken)
    except ElastiqError as error:
        assert "\n" not in str(error)
    else:
        assert len(content) > whole - 64 and header.shapes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GGUX" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 9) + bytes(60), "GGUF version 9 is not read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1), "header is not that of a GGUF file"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "cut short within its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, 2**62), "not that of a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no language model"),
    ],
)
def test_hostile_gguf_headers(tmp_path: Path, content: bytes, message: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ElastiqError, match=message):
        import_model(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_packed_directories(nested: Path, tmp_path: Path) -> None:
    export(nested, tmp_path / "packed", GPTQDirectory(), 4)
    arrays = load_file(tmp_path / "packed/model.safetensors")
    config = json.loads((tmp_path / "packed/config.json").read_text())
    layer = "model.layers.0.mlp.up_proj"

    def broken(change: Callable[[], object]) -> str:
        change()
        save_file(arrays, tmp_path / "packed/model.safetensors")
        (tmp_path / "packed/config.json").write_text(json.dumps(config))
        with pytest.raises(ElastiqError) as caught:
            import_model(tmp_path / "packed", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    settings_ = config["quantization_config"]
    whole = arrays[f"{layer}.qweight"]
    assert "are of no width" in broken(lambda: arrays.update({f"{layer}.qweight": whole[:-1].contiguous()}))
    arrays[f"{layer}.qweight"] = whole
    arrays[f"{layer}.g_idx"][3] = 500
    assert f"the arrays of {layer} do not fit together" in broken(lambda: None)
    arrays[f"{layer}.g_idx"][3] = 0
    assert "do not fit together" in broken(lambda: arrays.pop(f"{layer}.scales"))
    assert "quant_method 'new' is not read; known: gptq" in broken(lambda: settings_.update(quant_method="new"))


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        (GPTQDirectory(), {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin' in its settings, which"),
        (GPTQDirectory(), {"rotation": "hadamard"}, r"rotation is 'hadamard' in its settings, which is not read; take"),
        (GPTQDirectory(), {"pack_dtype": "int8"}, r"pack_dtype is 'int8'"),
        (AWQDirectory(), {"zero_point": "half"}, r"zero_point is 'half'"),
        (CompressedTensors(), {"transform_config": {"R1": {}}}, r"transform_config is \{'R1': \{\}\}"),
        (CompressedTensors(), {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme is \{'num_bits': 8\}"),
        (CompressedTensors(), {"config_groups": {"a": {"input_activations": {"num_bits": 8}}}},
         r"config_groups\.a\.input_activations is \{'num_bits': 8\} in its settings"),
        (CompressedTensors(), {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
         r"config_groups\.a\.weights\.type is 'float'"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_read(
    nested: Path, tmp_path: Path, target: GPTQDirectory, change: dict[str, object], message: str
) -> None:
    """What changes a model and is not known is named; what is empty says nothing."""
    export(nested, tmp_path / "packed", target, 4)
    config = json.loads((tmp_path / "packed/config.json").read_text())
    config["quantization_config"] |= {"unheard_of": None, **change}
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ElastiqError, match=message):
        import_model(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_arrays_that_nothing_reads(nested: Path, tmp_path: Path) -> None:
    """Named, like parameters that no array makes; biases of nothing but zeros say nothing."""
    export(nested, tmp_path / "packed", GPTQDirectory(), 4)
    whole = load_file(tmp_path / "packed/model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    zeros, scale = torch.zeros(whole[f"{layer}.scales"].shape[1]), torch.ones(1)

    def stored(arrays: dict[str, torch.Tensor]) -> None:
        save_file(arrays, tmp_path / "packed/model.safetensors")

    for strange, values in ((f"{layer}.input_scale", scale), (f"{layer}.bias", zeros + 1)):
        stored(whole | {strange: values})
        with pytest.raises(ElastiqError, match=rf"nothing of \w+ForCausalLM takes {strange}; take the model's own"):
            import_model(tmp_path / "packed", tmp_path / "out")
    stored({name: array for name, array in whole.items() if name != "model.norm.weight"})
    with pytest.raises(ElastiqError, match=r"no array of it makes model\.norm\.weight of \w+ForCausalLM; copy"):
        import_model(tmp_path / "packed", tmp_path / "out")
    stored(whole | {f"{layer}.bias": zeros})
    import_model(tmp_path / "packed", tmp_path / "out")
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_groups_of_compressed_tensors_need_not_be_neighbours() -> None:
    """With activation ordering every channel names its group."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (4, 16), generator=generator, dtype=torch.uint8)
    scale = 1 + torch.rand(4, 2, generator=generator).half()
    group = torch.randperm(16, generator=generator) % 2
    arrays = {
        "weight_packed": pack_stream(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([4, 16]),
        "weight_g_idx": group.int(),
    }
    wanted = [[(int(codes[row, i]) - 8) * float(scale[row, int(group[i])]) for i in range(16)] for row in range(4)]
    assert torch.equal(compressed_dense(arrays, 4), torch.tensor(wanted))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(-3, 300), columns=st.integers(-(2**62), 2**62))
def test_hostile_shapes_of_compressed_tensors(tmp_path: Path, rows: int, columns: int) -> None:
    assume(not (rows == 8 and 32 <= columns <= 256))
    directory = tmp_path / "packed"
    directory.mkdir(exist_ok=True)
    arrays = {
        "a.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(8, 2).half(),
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    save_file(arrays, directory / "model.safetensors")
    settings_ = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (directory / "config.json").write_text(json.dumps({"quantization_config": settings_}))
    with pytest.raises(ElastiqError):
        import_model(directory, tmp_path / "out")
