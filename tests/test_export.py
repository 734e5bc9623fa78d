"""Exports, opened by the code of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoint import write_random
from tiny import build_model, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import elastiq
from elastiq import ElastiqError, embedded
from elastiq.cli import app
from elastiq.export import GGUF, TARGETS, HuggingFace, export

IDS = torch.arange(40).reshape(2, 20) * 3
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(family: str = "llama", wide: bool = False, embeddings: bool = False) -> Path:
        key = f"{family}{wide}{embeddings}"
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            settings = WIDE if wide else {}
            make_model(family, directory / "source", **settings)
            made[key] = directory / "nested"
            write_random(
                build_model(family, **settings), directory / "source", made[key], embeddings=embeddings, group_size=32
            )
        return made[key]

    return get


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_hf_is_an_ordinary_model(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    summary = export(checkpoint(family), tmp_path / "out", HuggingFace(), 4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and summary.bits_per_weight == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert difference(logits(model), logits(elastiq.load(checkpoint(family), 4))) < 3e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2"])
def test_gguf_of_each_family(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Q4_1 holds codes of four bits as they are, so the logits differ by the rounding of an offset only."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    assert export(checkpoint(family), tmp_path / "model.gguf", GGUF("Q4_1"), 4).logits < 5e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_gguf_as_transformers_reads_it(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    export(checkpoint(family), tmp_path / "model.gguf", GGUF("Q4_1"), 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert difference(logits(model), logits(elastiq.load(checkpoint(family), 4))) < 5e-3


@pytest.mark.parametrize(("bits", "kind", "most"), [(2, "Q2_K", 0.2), (4, "Q4_K", 0.05), (8, "Q8_0", 0.02)])
def test_gguf_k_types(checkpoint: Callable[..., Path], tmp_path: Path, bits: int, kind: str, most: float) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    summary = export(checkpoint(wide=True), tmp_path / "model.gguf", GGUF(), bits)
    assert summary.worst["stored_as"] == kind
    assert summary.logits < most


def test_gguf_of_a_map_mixes_types(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    widths = dict.fromkeys(elastiq.checkpoint.CheckpointReader(checkpoint(wide=True)).manifest.matrices, 4)
    widths |= {"model.layers.0.mlp.up_proj": 2, "model.layers.0.self_attn.q_proj": 8}
    export(checkpoint(wide=True), tmp_path / "model.gguf", GGUF(), widths)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q2_K"
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == "F16" and kinds["output_norm.weight"] == "F32"


def test_gguf_carries_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    source = embedded.model_dir()
    write_random(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source, tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "model.gguf", GGUF("Q8_0"), 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(source)
    text = "To be, or not:  42!\n\nThe Düne's end."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token == own.eos_token


def test_exact_is_kept_or_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ElastiqError, match=r"at 4 bits is not held exactly by Q8_0 .*leave --exact out"):
        export(checkpoint(), tmp_path / "model.gguf", GGUF("Q8_0", exact=True), 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_half_written(
    checkpoint: Callable[..., Path], tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TARGETS[target], "open", stop)
    monkeypatch.setattr(TARGETS[target], "found", stop)
    with pytest.raises(ElastiqError, match="disk is full"):
        export(checkpoint(), tmp_path / "out", TARGETS[target](), 4)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("kept")
    with pytest.raises(ElastiqError, match="exists already; choose another output"):
        export(checkpoint(), tmp_path / "out", TARGETS[target](), 4)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "kept"]


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("qwen3_moe", GGUF(), "the architecture 'qwen3_moe' cannot be written; known: gemma2, gpt2, llama"),
        ("llama", GGUF("Q9_Z"), "unknown type Q9_Z; known: Q8_0"),
    ],
)
def test_refusals(checkpoint: Callable[..., Path], tmp_path: Path, family: str, target: GGUF, message: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ElastiqError, match=message):
        export(checkpoint(family), tmp_path / "out", target, 4)


def test_command(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["export", str(checkpoint()), "--to", "hf", "--bits", "3", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "summary.json")])
    assert result.exit_code == 0, result.output
    assert "16.00 bits per weight" in result.output and "logits differ by" in result.output
    assert json.loads((tmp_path / "summary.json").read_text())["target"] == "hf"
    wrong = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "no"), "--type", "q4_k"])
    assert wrong.exit_code == 2
