"""Small floats in compressed-tensors, decompressed by the package itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError, Recipe, recipes
from elastiq.foreign.exporting import CompressedTensors, export
from elastiq.runtime import nested_matrices

IDS = torch.arange(40).reshape(2, 20) * 3
CASES = {
    "nvfp4-pack-quantized": (recipes.nv(), 4.63),
    "mxfp4-pack-quantized": (recipes.mx("e2m1"), 4.25),
    "mxfp6-pack-quantized": (recipes.mx("e2m3"), 6.25),
    "mxfp8-quantized": (recipes.mx("e4m3fn"), 8.25),
    "float-quantized": (recipes.fp8(), 8.5),
    "float-quantized, groups": (recipes.fp8(group_size=16, scales="float"), 10.0),
}


def quantized(tmp_path: Path, recipe: Recipe) -> Path:
    make_model("llama", tmp_path / "source")
    elastiq.quantize(tmp_path / "source", tmp_path / "nested", recipe, IDS)
    return tmp_path / "nested"


@pytest.mark.parametrize("case", CASES)
def test_held_without_change(tmp_path: Path, case: str) -> None:
    """Every matrix; NVFP4 up to rounding, because its decompressor computes in bfloat16 and divides by the scale."""
    package = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    recipe, most = CASES[case]
    nested = quantized(tmp_path, recipe)
    summary = export(nested, tmp_path / "out", CompressedTensors(exact=True))
    assert summary.error < 1e-12 and round(summary.bits_per_weight, 2) <= most and summary.logits < 1e-5
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == case.partition(",")[0]
    scheme = package.quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    arrays = load_file(tmp_path / "out/model.safetensors")
    matrices = nested_matrices(elastiq.load(nested))
    assert len(matrices) == 14
    for name, matrix in matrices.items():
        own = {key.rpartition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{name}.")}
        held = BaseCompressor.get_value_from_registry(config["format"]).decompress(own, scheme)["weight"].float()
        if "nv" in case:
            assert torch.allclose(held, matrix.dense(), rtol=2**-7)
            codes = unpack_fp4_from_uint8(own["weight_packed"], *matrix.stored.shape, dtype=torch.float32)
            scale, top = own["weight_scale"].float(), own["weight_global_scale"]
            held = dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=top)
            assert torch.allclose(held, matrix.dense(), rtol=1e-6)
        else:
            assert torch.equal(held, matrix.dense())
    plain = case.startswith("float")  # what comes in blocks is decompressed to bfloat16
    dtype = torch.float32 if plain else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    with torch.inference_mode():
        found, wanted = (m(input_ids=IDS, use_cache=False).logits.float() for m in (model, elastiq.load(nested)))
    assert (found - wanted).norm() < (1e-3 if plain else 3e-2) * wanted.norm()


def test_matrices_read_as_one_share_their_global_scale(tmp_path: Path) -> None:
    """vLLM takes the largest of those of query, key and value, and of gate and up, for all of them."""
    nested = quantized(tmp_path, recipes.nv())
    summary = export(nested, tmp_path / "out", CompressedTensors())
    assert 0 < summary.error < 1e-3
    arrays = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        for parent, leaves in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            names = [f"model.layers.{layer}.{parent}.{leaf}.weight_global_scale" for leaf in leaves]
            assert len({float(arrays[name]) for name in names}) == 1


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipes.nf4(group_size=32), r"down_proj consists of nf4 under double scales per 32 weights, which it cannot"),
        (recipes.mx("e3m2"), r"e3m2 under e8m0 scales per 32 weights"),
        (recipes.nv("int4"), r"int4 under e4m3 scales per 16 weights"),
    ],
)
def test_refused_by_name(tmp_path: Path, recipe: Recipe, message: str) -> None:
    nested = quantized(tmp_path, recipe)
    with pytest.raises(ElastiqError, match=message):
        export(nested, tmp_path / "out", CompressedTensors())
    assert not (tmp_path / "out").exists()
