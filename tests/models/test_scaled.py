"""8-bit weights with scales beside them: the values of every known layout, and the sentence for every other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from elastiq.core import ElastiqError
from elastiq.evaluate import load_full
from elastiq.models import ModelSource, build_skeleton, load_module
from elastiq.models.scaled import FLOAT8, Scaling, is_eight_bit

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAME = "model.layers.1.mlp.down_proj.weight"


def naive(codes: Tensor, scale: Tensor, block: tuple[int, int], zero: Tensor | None = None) -> Tensor:
    """One weight at a time, in double precision. scale, zero: [rows of blocks, columns of blocks]."""
    values = torch.empty(codes.shape, dtype=torch.float64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            at = (row // block[0], column // block[1])
            offset = 0.0 if zero is None else float(zero[at])
            values[row, column] = (float(codes[row, column]) - offset) * float(scale[at])
    return values


def random_codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return (torch.randn(shape, generator=generator) * 20).to(dtype)


def random_scale(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-3).to(dtype)


def read(arrays: dict[str, Tensor], settings: dict[str, Any] | None = None, name: str = "a.weight") -> Tensor:
    return Scaling(Path("model"), arrays, settings or {}).weights(name, arrays[name], arrays.__getitem__)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 8]}
GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 12}}}}


@pytest.mark.parametrize(
    ("scale", "block", "settings"),
    [
        ((), (40, 36), {}),  # one scale: ModelOpt, compressed-tensors
        ((1,), (40, 36), {}),
        ((40,), (1, 36), {}),  # one for a row: compressed-tensors, fbgemm_fp8
        ((40, 1), (1, 36), {}),
        ((40, 3), (1, 12), GROUPS),  # groups of a row
        ((3, 5), (16, 8), BLOCKS),  # blocks, the last ones cut
        ((1, 1), (128, 128), {}),
        ((5, 1, 9, 1), (8, 4), {}),  # blocks as ModelOpt writes them
    ],
)
@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_values_are_those_of_a_naive_reading(
    scale: tuple[int, ...], block: tuple[int, int], settings: dict[str, Any], dtype: torch.dtype, held: torch.dtype
) -> None:
    for end in ("_scale", "_scale_inv"):
        arrays = {"a.weight": random_codes((40, 36), dtype), f"a.weight{end}": random_scale(scale, held)}
        squeezed = arrays[f"a.weight{end}"].reshape([size for size in scale if size > 1] or [1])
        grid = squeezed.reshape(-(-40 // block[0]), -(-36 // block[1]))
        expected = naive(arrays["a.weight"], grid, block)
        found = read(arrays | {"a.input_scale": torch.ones(()), "a.bias": torch.ones(40)}, settings)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_blocks_of_128_are_known_without_a_word_about_them() -> None:
    arrays = {"a.weight": random_codes((200, 130), E4M3), "a.weight_scale_inv": random_scale((2, 2))}
    expected = naive(arrays["a.weight"], arrays["a.weight_scale_inv"], (128, 128))
    with pytest.raises(ElastiqError, match=r"a\.weight of \[200, 130\] has scales of \[2, 2\], and it is not known"):
        read(arrays)  # 100 rows for a scale would be as likely
    torch.testing.assert_close(read(arrays, {"weight_block_size": [128, 128]}).double(), expected, rtol=1e-6, atol=0)
    arrays = {"a.weight": random_codes((129, 256), E4M3), "a.weight_scale_inv": random_scale((2, 2))}
    expected = naive(arrays["a.weight"], arrays["a.weight_scale_inv"], (128, 128))
    torch.testing.assert_close(read(arrays).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scale", "block"), [((1,), (40, 36)), ((40, 1), (1, 36)), ((40, 3), (1, 12))])
def test_zero_points(scale: tuple[int, ...], block: tuple[int, int]) -> None:
    arrays = {
        "a.weight": random_codes((40, 36), torch.int8),
        "a.weight_scale": random_scale(scale),
        "a.weight_zero_point": random_codes(scale, torch.int8, seed=2),
    }
    shape = (-(-40 // block[0]), -(-36 // block[1]))
    expected = naive(
        arrays["a.weight"], arrays["a.weight_scale"].reshape(shape), block, arrays["a.weight_zero_point"].reshape(shape)
    )
    torch.testing.assert_close(read(arrays, GROUPS).double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_of_bitsandbytes() -> None:
    arrays = {
        "a.weight": random_codes((40, 36), torch.int8),
        "a.SCB": random_scale((40,)),
        "a.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    expected = naive(arrays["a.weight"], arrays["a.SCB"][:, None].double() / 127, (1, 36))
    torch.testing.assert_close(read(arrays).double(), expected, rtol=1e-6, atol=0)
    assert Scaling(Path("model"), arrays, {}).companions == {"a.SCB", "a.weight_format"}


def test_stacked_experts_have_scales_of_their_own() -> None:
    codes, scale = random_codes((3, 32, 24), E4M3), random_scale((3, 2, 3))
    found = read({"x.gate_up_proj": codes, "x.gate_up_proj_scale_inv": scale}, BLOCKS, "x.gate_up_proj")
    for expert in range(3):
        expected = naive(codes[expert], scale[expert], (16, 8))
        torch.testing.assert_close(found[expert].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, "a.weight is stored in float8_e4m3fn with no scale beside it, a layout that is not known"),
        ({"a.scale": ()}, "with no scale beside it"),
        ({"a.weight_scale": (), "a.weight_scale_inv": ()}, "with a.weight_scale_inv, a.weight_scale beside it"),
        ({"a.weight_scale": (), "a.weight_scale_2": ()}, "with a.weight_scale_2 beside it"),
        ({"a.weight_scale": (40, 1), "a.pre_quant_scale": (36,)}, "with a.pre_quant_scale beside it"),
        ({"a.weight_scale": (40, 3), "a.weight_g_idx": (36,)}, "with a.weight_g_idx beside it"),
        ({"a.weight_scale": (7, 1)}, r"a.weight of \[40, 36\] has scales of \[7, 1\], and it is not known which"),
        ({"a.weight_scale": (40, 0)}, r"has scales of \[40, 0\]"),
        ({"a.weight_scale": (36,)}, r"has scales of \[36, 1\]"),
        ({"a.weight_scale": (2, 40, 36)}, r"has scales of \[2, 40, 36\]"),
    ],
)
def test_other_layouts_are_refused_by_name(arrays: dict[str, tuple[int, ...]], sentence: str) -> None:
    held = {"a.weight": random_codes((40, 36), E4M3)} | {name: random_scale(shape) for name, shape in arrays.items()}
    with pytest.raises(ElastiqError, match=sentence + ".*; give the 16-bit model"):
        read(held)


def test_integers_as_scales_are_refused() -> None:
    arrays = {"a.weight": random_codes((40, 36), E4M3), "a.weight_scale": torch.ones(40, 1, dtype=torch.uint8)}
    with pytest.raises(ElastiqError, match=r"a\.weight is stored in float8_e4m3fn with scales in uint8"):
        read(arrays)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "fbgemm_fp8"}, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, False),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, False),
        ({"quant_method": "compressed-tensors", "format": ["x"]}, False),
        ({"quant_method": "compressed-tensors", "format": "int-quantized", "transform_config": {"x": 1}}, False),
        ({"quant_method": "compressed-tensors", "format": "int-quantized", "sparsity_config": {"format": "24"}}, False),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "nvfp4-pack-quantized"}}}, False),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": ["fp8"]}, False),
        ({}, False),
    ],
)
def test_which_settings_are_of_8_bit_weights(settings: dict[str, Any], known: bool) -> None:
    assert is_eight_bit(settings) is known


def eight_bit(
    directory: Path, dtype: torch.dtype, settings: dict[str, Any] | None, end: str, block: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Store the blocks' matrices of a model in 8 bits with scales; the values that they stand for."""
    arrays, values = {}, {}
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    for name, weight in load_file(directory / "model.safetensors").items():
        arrays[name] = values[name] = weight
        if not name.endswith("proj.weight"):
            continue
        rows, columns = block or weight.shape
        tiles = weight.float().reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        scale = tiles.abs().amax((1, 3)) / most
        codes = (tiles / scale[:, None, :, None]).reshape(weight.shape)
        codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
        arrays |= {name: codes, name + end: scale if block else scale.reshape(())}
        arrays[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
        values[name] = naive(codes, scale, (rows, columns)).float()
    save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    if settings is not None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
def test_a_model_without_a_word_about_its_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    values = eight_bit(tiny.make_model("llama", tmp_path), dtype, None, "_scale", None)
    source = ModelSource(tmp_path)
    assert source.is_eight_bit
    model = build_skeleton(source, torch.float32)
    load_module(model, "", source, torch.float32, "cpu")
    full = load_full(tmp_path, None, "cpu", torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, values[name].float(), rtol=1e-6, atol=0)
        assert torch.equal(tensor, full.state_dict()[name])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_block_scales_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    eight_bit(tiny.make_model(family, tmp_path), E4M3, settings, "_scale_inv", (16, 16))
    source = ModelSource(tmp_path)
    assert not hasattr(source.config, "quantization_config")
    model = build_skeleton(source, torch.float32)
    load_module(model, "", source, torch.float32, "cpu")
    dequantized = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=dequantized)
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_without_scales_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny.make_model("llama", tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays[NAME] = torch.ones(arrays[NAME].shape, dtype=dtype)
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    source = ModelSource(tmp_path)
    model = build_skeleton(source, torch.float32)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ElastiqError, match=f"down_proj.weight is stored in {name} without scales that are known; give"):
        load_module(model, "model.layers.1", source, torch.float32, "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    eight_bit(tiny.make_model("llama", tmp_path), E4M3, None, "_scale", None)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays[f"{NAME}_scale"].fill_(value)
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    source = ModelSource(tmp_path)
    with pytest.raises(ElastiqError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite weights"):
        load_module(build_skeleton(source, torch.float32), "", source, torch.float32, "cpu")


def test_one_matrix_at_a_time_is_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight_bit(tiny.make_model("llama", tmp_path), E4M3, None, "_scale", None)
    read: list[str] = []
    original = Scaling.weights

    def record(self: Scaling, name: str, stored: Tensor, get: Callable[[str], Tensor]) -> Tensor:
        read.extend([name] if stored.dtype in FLOAT8 else [])
        return original(self, name, stored, get)

    monkeypatch.setattr(Scaling, "weights", record)
    source = ModelSource(tmp_path)
    model = build_skeleton(source, torch.float32)
    assert not read
    load_module(model, "model.layers.1.mlp", source, torch.float32, "cpu")
    assert sorted(read) == sorted(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
