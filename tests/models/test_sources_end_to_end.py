"""Model directories of odd kinds, quantized and loaded again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import elastiq
from elastiq.evaluate import evaluate
from elastiq.foreign.exporting import HuggingFace, export
from elastiq.foreign.importing import ordinary

IDS = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
RECIPE = elastiq.recipes.rtn(levels=(4, 8))
CONFIGS = {
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_8_bits_are_quantized_as_the_weights_they_stand_for(method: str, tmp_path: Path) -> None:
    source, plain = tiny.make_model("llama", tmp_path / "source"), tiny.make_model("llama", tmp_path / "plain")
    end = "_scale_inv" if method == "fp8" else "_scale"
    stored, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        stored[name] = values[name] = weight
        if name.endswith("proj.weight"):
            scale = torch.tensor([[2.0**-11]])  # a power of two: 16 bits hold the products
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), name + end: scale}
            values[name] = stored[name].to(weight.dtype) * scale.to(weight.dtype)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[method]}))
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with ordinary(source, tmp_path / "out") as taken:  # nothing to import first
        assert taken == source
    for directory, output in ((source, tmp_path / "out"), (plain, tmp_path / "expected")):
        elastiq.quantize(directory, output, RECIPE, IDS)
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    written = [json.loads((tmp_path / f"{name}/config.json").read_text()) for name in ("out", "expected")]
    assert written[0] == written[1]
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    evaluate(tmp_path / "out", [8], text_file(tmp_path), window=16, num_windows=2, against=source)
    document = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert CONFIGS[method]["quant_method"] not in json.dumps(document) + (tmp_path / "out/README.md").read_text()


def text_file(directory: Path) -> Path:
    file = directory / "text.txt"
    file.write_text("some words to score " * 20)
    return file


@torch.no_grad()
def test_a_head_of_its_own_is_written_as_untied(tmp_path: Path) -> None:
    source = tiny.make_model("llama", tmp_path / "source", tie_word_embeddings=True)
    arrays = load_file(source / "model.safetensors")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] * -1.5
    save_file(arrays, source / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(IDS).logits
    elastiq.quantize(source, tmp_path / "out", RECIPE, IDS)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaders = (elastiq.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for model in loaders:
        logits = model(IDS).logits.float()
        assert float((logits - expected).norm() / expected.norm()) < 0.05
    export(tmp_path / "out", tmp_path / "exported", HuggingFace(), 8)
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.05


def test_a_model_whose_every_weight_is_nested_generates_and_is_saved(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "olmo", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=tiny.VOCAB, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")  # its norms have no weight
    tiny.make_tokenizer().save_pretrained(tmp_path / "source")
    elastiq.quantize(tmp_path / "source", tmp_path / "out", replace(RECIPE, embeddings=True), IDS)
    expected = None
    for model in (elastiq.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert sum(parameter.numel() for parameter in model.parameters()) == 0
        assert model.device == torch.device("cpu") and model.dtype.is_floating_point
        assert not any(name == "nothing_left" for name in model.state_dict())
        tokens = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)[0, IDS.shape[1] :].tolist()
        assert list(elastiq.generate(model, IDS[:1], max_new_tokens=4)) == tokens
        expected = tokens if expected is None else expected
        assert tokens == expected
    model.save_pretrained(tmp_path / "saved")
    saved = elastiq.load(tmp_path / "saved")
    assert torch.equal(saved(IDS).logits, model(IDS).logits)
