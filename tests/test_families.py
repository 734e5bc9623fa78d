"""The page of families says what its script finds; some families through the whole way."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import elastiq
from elastiq.foreign.exporting import HuggingFace, export

ROOT = Path(__file__).resolve().parents[1]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


FAMILIES = script()


@pytest.mark.parametrize("model_type", ["falcon", "gpt_oss", "mamba", "mamba2", "xglm", "llama4_text"])
def test_the_page_says_what_the_script_finds(model_type: str, tmp_path: Path) -> None:
    """Layers of a class of their own, experts [in, out] with biases, a head asked for its weight, an infinity in
    config.json, a factor that is no buffer, and a refusal."""
    outcome = FAMILIES.attempt(model_type, FAMILIES.architectures()[model_type], tmp_path)
    lines = FAMILIES.rows_of(FAMILIES.PAGE.read_text(encoding="utf-8"))
    assert outcome.row(model_type) == lines[model_type]
    assert (outcome.fine and outcome.blocks == "right") or outcome.blocks.startswith("refused: Llama4ForCausalLM")


def test_the_page_is_made_of_its_lines() -> None:
    text = FAMILIES.PAGE.read_text(encoding="utf-8")
    lines = FAMILIES.rows_of(text)
    rest = text[text.index("families are right") :]
    assert FAMILIES.page(lines).endswith(rest) and list(lines) == sorted(lines)
    assert "**" not in "".join(lines.values())


@pytest.mark.parametrize("spelling", ["Infinity", '{"__float__": "Infinity"}'])
def test_an_infinity_in_config_json(spelling: str, tmp_path: Path) -> None:
    """As transformers of either age spells it; what is written is strict JSON and read back as a number."""
    with FAMILIES.quiet():
        model = FAMILIES.make("mamba2", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["time_step_limit"] = ["first", "second"]
    file.write_text(json.dumps(config).replace('"first"', "0.0").replace('"second"', spelling))
    elastiq.quantize(tmp_path / "model", tmp_path / "out", FAMILIES.RECIPE(), FAMILIES.IDS)
    json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert AutoConfig.from_pretrained(tmp_path / "out").time_step_limit[1] == float("inf")
    loaded = elastiq.load(tmp_path / "out")
    assert loaded.config.time_step_limit[1] == float("inf")
    wanted = model(FAMILIES.IDS, use_cache=False).logits
    assert (loaded(FAMILIES.IDS, use_cache=False).logits - wanted).norm() < 0.05 * wanted.norm()


def test_an_embedding_of_its_own_kind_is_refused_before_the_work(tmp_path: Path) -> None:
    if "inkling2_text" not in FAMILIES.architectures():
        pytest.skip("this transformers has no such family")
    with FAMILIES.quiet():
        FAMILIES.make("inkling2_text", tmp_path / "model")
    with pytest.raises(elastiq.ElastiqError, match=r"embed_tokens: \w+ is an embedding of its own kind; keep it in 16"):
        elastiq.quantize(tmp_path / "model", tmp_path / "out", FAMILIES.RECIPE(embeddings=True), FAMILIES.IDS)
    assert not (tmp_path / "out.partial").exists()


def test_experts_transposed_at_lower_widths_and_exported(tmp_path: Path) -> None:
    with FAMILIES.quiet():
        model = FAMILIES.make("gpt_oss", tmp_path / "model")
    elastiq.quantize(tmp_path / "model", tmp_path / "out", elastiq.recipes.nested(levels=(3, 8)), FAMILIES.IDS)
    loaded = elastiq.load(tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    original = model.get_parameter(name)
    experts = loaded.get_submodule(name)
    for bits, bound in ((8, 0.06), (3, 0.4)):
        elastiq.set_bits(loaded, bits)
        for expert in range(4):
            error = (experts[torch.tensor(expert)] - original[expert]).norm() / original[expert].norm()
            assert experts[expert].shape == original[expert].shape and error < bound
    elastiq.set_bits(loaded, {name: "8383"})
    mixed = loaded.get_submodule(name)
    assert mixed[0].shape == original[0].shape and (mixed[0] - original[0]).norm() < 0.06 * original[0].norm()
    assert (mixed[1] - original[1]).norm() > 0.06 * original[1].norm()
    export(tmp_path / "out", tmp_path / "plain", HuggingFace(), 8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).get_parameter(name)
    assert plain.shape == original.shape and (plain - original).norm() < 0.06 * original.norm()
