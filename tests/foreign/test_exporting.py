"""Exports, opened by the code of others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoint import write_random
from safetensors.torch import load_file
from tiny import build_model, make_config, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from typer.testing import CliRunner

import elastiq
from elastiq import ElastiqError, embedded
from elastiq.checkpoint import CheckpointReader
from elastiq.cli import app
from elastiq.foreign.bit_stream import pack_stream, unpack_stream
from elastiq.foreign.compressed import compressed_dense
from elastiq.foreign.exporting import GGUF, TARGETS, AWQDirectory, CompressedTensors, GPTQDirectory, HuggingFace, export
from elastiq.foreign.gguf.exporting import _prepends_space
from elastiq.foreign.gguf.families import FAMILIES, complete, family_of
from elastiq.foreign.integer import IntegerTarget, refit
from elastiq.foreign.target import Target
from elastiq.foreign.view import GridCodes, View
from elastiq.runtime import nested_matrices

ARRAYS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
IDS = torch.arange(40).reshape(2, 20) * 3
CARRIED = {
    "mistral": {"sliding_window": None},
    "gemma3": {"num_hidden_layers": 6, "layer_types": None},
}
"""Settings of attention that a GGUF file can say."""
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(family: str = "llama", wide: bool = False, embeddings: bool = False, **changes: object) -> Path:
        key = f"{family}{wide}{embeddings}{changes}"
        if key not in made:
            directory = tmp_path_factory.mktemp(family)
            settings = (WIDE if wide else {}) | changes
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2"])
def test_gguf_of_each_family(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Q4_1 holds codes of four bits as they are, so the logits differ by the rounding of an offset only."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    made = checkpoint(family, **CARRIED.get(family, {}))
    assert export(made, tmp_path / "model.gguf", GGUF("Q4_1"), 4).logits < 5e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_gguf_as_transformers_reads_it(checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    export(checkpoint(family), tmp_path / "model.gguf", GGUF("Q4_1"), 4)
    unsaid = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}  # of the size of a head, but transformers: 256
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32, **unsaid)
    assert difference(logits(model), logits(elastiq.load(checkpoint(family), 4))) < 5e-3


@pytest.mark.parametrize(("bits", "kind", "most"), [(2, "Q2_K", 0.2), (4, "Q4_K", 0.05), (8, "Q8_0", 0.02)])
def test_gguf_k_types(checkpoint: Callable[..., Path], tmp_path: Path, bits: int, kind: str, most: float) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    summary = export(checkpoint(wide=True), tmp_path / "model.gguf", GGUF(), bits)
    assert summary.worst["stored_as"] == kind
    assert summary.logits < most


@pytest.mark.parametrize(("bits", "kind", "source"), [(3, "Q3_K", 8), (4, "Q4_K", 4), (4, "Q4_0", 8), (4, "Q8_0", 4),
                                                      (5, "Q5_K", 8), (7, "Q8_0", 8)])  # fmt: skip
def test_gguf_fits_types_to_the_level_that_serves_them(
    checkpoint: Callable[..., Path], tmp_path: Path, bits: int, kind: str, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own where the type holds its codes, the widest for types without minima and widths between the levels."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setattr("elastiq.foreign.exporting.MOST_DIFFERENT", 5.0)  # a random model's levels are unrelated
    summary = export(checkpoint(wide=True), tmp_path / "model.gguf", GGUF(kind), bits)
    assert summary.worst["stored_as"] == kind and summary.worst["source_bits"] == source


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
    source = shutil.copytree(embedded.model_dir(), tmp_path / "source")
    data = json.loads((source / "tokenizer.json").read_text())
    beyond = json.loads((source / "config.json").read_text())["vocab_size"]  # no embedding, as one token of Gemma 3
    data["added_tokens"].append({**data["added_tokens"][0], "id": beyond, "content": "<image_soft_token>"})
    (source / "tokenizer.json").write_text(json.dumps(data))
    write_random(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), source, tmp_path / "nested")
    export(tmp_path / "nested", tmp_path / "model.gguf", GGUF("Q8_0"), 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(source)
    text = "To be, or not:  42!\n\nThe Düne's end."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token == own.eos_token


@pytest.mark.parametrize(
    ("tokenizer", "prepends"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}, {"type": "Replace"}]}}, True),
        ({"normalizer": {"type": "Replace"}, "pre_tokenizer": {"type": "Split"}}, False),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False),
    ],
)
def test_gguf_knows_whether_a_text_begins_with_a_space(tokenizer: dict[str, object], prepends: bool) -> None:
    assert _prepends_space(tokenizer) == prepends


def test_gguf_refuses_queries_scaled_otherwise(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    settings = {"query_pre_attn_scalar": 256}
    make_model("gemma2", tmp_path / "source", **settings)
    write_random(build_model("gemma2", **settings), tmp_path / "source", tmp_path / "nested")
    with pytest.raises(ElastiqError, match=r"scaled for 256 channels, and llama\.cpp would scale them for 16; export"):
        export(tmp_path / "nested", tmp_path / "out", GGUF("Q4_1"), 4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("mistral", {"sliding_window": 8}, r"sliding_window of this mistral is 8, .* lets every layer see everything"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window of"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window of"),
        ("qwen3", {"attention_bias": True}, r"attention_bias of this qwen3 is True, .*takes False for granted"),
        ("llama", {"hidden_act": "relu"}, r"hidden_act of this llama is 'relu', which a GGUF file cannot say"),
        ("gpt2", {"activation_function": "relu"}, "activation_function of this gpt2 is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx of this gpt2 is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights of this gpt2 is False"),
        ("gemma2", {"attn_logit_softcapping": None}, r"attn_logit_softcapping of this gemma2 is None, .*always caps"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, r"layer_types of this gemma2 .*lets one layer in 2 see"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention of this gemma2 is True"),
        ("gemma3", {}, r"layer_types of this gemma3_text .*lets one layer in 6 see everything"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 64}},
            "the rotation 'yarn' of qwen3 cannot be written; export to hf",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
            r"llama_4_scaling_beta of the rotation of this llama is 0\.1, .*has no such number",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_gguf_names_what_it_cannot_say(tmp_path: Path, family: str, settings: dict[str, object], message: str) -> None:
    """Every setting that differs from what the family always has, whatever it is called."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    config = complete(make_config(family, **settings).to_dict())
    with pytest.raises(ElastiqError, match=message):
        family_of(config)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gguf_takes_a_default_of_every_family(family: str) -> None:
    family_of(complete({"model_type": family, **({"sliding_window": None} if family == "mistral" else {})}))


def test_gguf_takes_windows_that_nothing_feels() -> None:
    """A window as long as the context, and settings of windows that are turned off."""
    family_of(complete(make_config("mistral", sliding_window=256).to_dict()))
    off = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}
    family_of(complete(make_config("qwen2", **off).to_dict()))


@pytest.mark.parametrize("target", [GGUF("Q4_1"), GPTQDirectory(), AWQDirectory(), CompressedTensors(), HuggingFace()])
def test_a_head_of_its_own_under_a_config_that_ties(checkpoint: Callable[..., Path], tmp_path: Path, target: Target
                                                    ) -> None:  # fmt: skip
    """As it is loaded: the head that is stored, whatever config.json says."""
    nested = shutil.copytree(checkpoint(), tmp_path / "nested")
    config = json.loads((nested / "config.json").read_text())
    (nested / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    checksums = json.loads((nested / "checksums.json").read_text())
    checksums["files"]["config.json"]["sha256"] = hashlib.sha256((nested / "config.json").read_bytes()).hexdigest()
    (nested / "checksums.json").write_text(json.dumps(checksums))
    summary = export(nested, tmp_path / "out", target, 4)
    assert summary.logits < 0.15
    if not target.is_file:
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_gguf_without_what_has_a_default(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    nested = shutil.copytree(checkpoint(rms_norm_eps=1e-6, max_position_embeddings=2048), tmp_path / "nested")
    config = json.loads((nested / "config.json").read_text())
    for key in ("rms_norm_eps", "max_position_embeddings", "rope_parameters", "head_dim"):
        config.pop(key, None)
    (nested / "config.json").write_text(json.dumps(config))
    reader = View(CheckpointReader(nested, verify=False), 4)
    GGUF("Q4_1").write(reader, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {key: fields[f"llama.{key}"].contents() for key in (
        "attention.layer_norm_rms_epsilon", "context_length", "rope.freq_base", "attention.key_length"
    )}  # fmt: skip
    assert said == {
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "context_length": 2048, "rope.freq_base": 10000.0,
        "attention.key_length": 16,
    }  # fmt: skip


def canonical_stream(words: torch.Tensor, bits: int, count: int) -> list[int]:
    """Codes of one row of words, read as one long number."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(number >> (bits * index)) & (2**bits - 1) for index in range(count)]


def test_streams_are_dense_and_reversible() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (3, 70), generator=generator, dtype=torch.uint8)
        words = pack_stream(codes, bits)
        assert words.shape == (3, -(-70 * bits // 32))
        assert canonical_stream(words[1], bits, 70) == codes[1].tolist()
        assert torch.equal(unpack_stream(words, bits, 70), codes)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_as_its_layout_says(
    checkpoint: Callable[..., Path], tmp_path: Path, version: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One column of one matrix, unpacked in plain Python."""
    # A random model feels whole zero points at two bits.
    monkeypatch.setattr("elastiq.foreign.exporting.MOST_DIFFERENT", 5.0)
    export(checkpoint(), tmp_path / "out", GPTQDirectory(version=version), bits)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == {1: "gptq", 2: "gptq_v2"}[version] and config["bits"] == bits
    assert "gptqmodel:0.9.0" in config["meta"]["quantizer"]  # without which GPT-QModel refuses version 1
    arrays, name, column = load_file(tmp_path / "out/model.safetensors"), "model.layers.0.mlp.up_proj", 5
    codes = canonical_stream(arrays[f"{name}.qweight"][:, column], bits, 64)
    values = []
    for channel, code in enumerate(codes):
        group = int(arrays[f"{name}.g_idx"][channel])
        zero = canonical_stream(arrays[f"{name}.qzeros"][group], bits, 96)[column] + (version == 1)
        values.append(float(arrays[f"{name}.scales"][group, column]) * (code - zero))
    wanted = nested_matrices(elastiq.load(checkpoint(), bits))[name].dense()[column]
    assert difference(torch.tensor(values), wanted) < {2: 0.5, 3: 0.25, 4: 0.12, 8: 0.01}[bits]


def test_gptq_map_names_its_exceptions(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    names = CheckpointReader(checkpoint()).manifest.matrices
    widths = dict.fromkeys(names, 4) | {"model.layers.0.mlp.up_proj": 8}
    export(checkpoint(), tmp_path / "out", GPTQDirectory(), widths)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["bits"] == 4
    assert config["dynamic"] == {r"+:^model\.layers\.0\.mlp\.up_proj$": {"bits": 8}}


def test_awq_as_its_layout_says(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    export(checkpoint(), tmp_path / "out", AWQDirectory(), 4)
    arrays, name = load_file(tmp_path / "out/model.safetensors"), "model.layers.1.mlp.down_proj"

    def nibble(words: torch.Tensor, column: int) -> int:
        place = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
        return int(words[column // 8]) >> (4 * place) & 15

    column = 13
    values = torch.tensor([
        float(arrays[f"{name}.scales"][i // 32, column])
        * (nibble(arrays[f"{name}.qweight"][i], column) - nibble(arrays[f"{name}.qzeros"][i // 32], column))
        for i in range(96)
    ])  # fmt: skip
    assert difference(values, nested_matrices(elastiq.load(checkpoint(), 4))[name].dense()[column]) < 0.12


@pytest.mark.parametrize(("bits", "asymmetric"), [(2, False), (3, False), (4, False), (4, True), (5, False), (8, True)])
def test_compressed_tensors_unpacks_what_was_meant(
    checkpoint: Callable[..., Path], tmp_path: Path, bits: int, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the package itself, for every matrix."""
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    monkeypatch.setattr("elastiq.foreign.exporting.MOST_DIFFERENT", 5.0)  # a random model's levels are unrelated
    export(checkpoint(), tmp_path / "out", CompressedTensors(asymmetric=asymmetric), bits)
    arrays = load_file(tmp_path / "out/model.safetensors")
    packed = [name.removesuffix(".weight_packed") for name in arrays if name.endswith(".weight_packed")]
    assert len(packed) == 14
    for name in packed:
        own = {short: arrays.get(f"{name}.{short}") for short in ARRAYS}
        shape = torch.Size(own["weight_shape"].tolist())
        codes = helpers.unpack_from_int32(own["weight_packed"], bits, shape).float()
        scale = own["weight_scale"].float().repeat_interleave(32, 1)
        zero = torch.zeros_like(scale)
        if asymmetric:
            groups = torch.Size([shape[0], shape[1] // 32])
            zero = helpers.unpack_from_int32(own["weight_zero_point"], bits, groups, packed_dim=0).float()
            zero = zero.repeat_interleave(32, 1)
        held = {short: array for short, array in own.items() if array is not None}
        assert torch.allclose((codes - zero) * scale, compressed_dense(held, bits), rtol=1e-6)


def test_compressed_tensors_in_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    # Zero points of a random model do not go without loss.
    monkeypatch.setattr("elastiq.foreign.exporting.MOST_DIFFERENT", 5.0)
    widths = dict.fromkeys(CheckpointReader(checkpoint()).manifest.matrices, 4) | {"model.layers.0.mlp.up_proj": 8}
    for given in (4, widths):
        path = tmp_path / str(type(given).__name__)
        target = CompressedTensors()
        export(checkpoint(), path, target, given)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        dense = target.open(path, View(CheckpointReader(checkpoint()), given))
        assert difference(logits(model), logits(dense)) < 1e-3


def test_zero_points_in_transformers(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """transformers 5.23 reads packed zero points, llm-compressor's too, only where it is told to dequantize."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    target = CompressedTensors(asymmetric=True)
    export(checkpoint(), tmp_path / "out", target, 4)
    settings = CompressedTensorsConfig(dequantize=True)
    with pytest.warns(UserWarning, match="quantization_config"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, quantization_config=settings
        )
    dense = target.open(tmp_path / "out", View(CheckpointReader(checkpoint()), 4))
    assert difference(logits(model), logits(dense)) < 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_refit_is_near_the_best_of_a_fine_search(symmetric: bool) -> None:
    """Each group against every whole zero point and 400 scales, in double precision."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (4, 64), generator=generator, dtype=torch.uint8)
    scale = 0.02 + 0.01 * torch.rand(4, 2, generator=generator)
    source = GridCodes(codes, scale, 7 + torch.rand(4, 2, generator=generator), 32, 4)
    found = refit(source, 4, symmetric)
    x, held = source.dense().double().unflatten(-1, (-1, 32)), found.dense().double().unflatten(-1, (-1, 32))
    best = torch.full((4, 2), torch.inf, dtype=torch.float64)
    for zero in (8,) if symmetric else range(16):
        for factor in torch.linspace(0.5, 1.5, 400).tolist():
            step = (scale.double() * factor).unsqueeze(-1)
            tried = ((x / step).round() + zero).clamp(0, 15) - zero
            best = torch.minimum(best, (tried * step - x).square().sum(-1))
    assert ((held - x).square().sum(-1) <= 1.1 * best + 1e-9).all()


def test_exact_is_kept_or_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    with pytest.raises(ElastiqError, match=r"at 4 bits is not held exactly by Q8_0 .*leave --exact out"):
        export(checkpoint(), tmp_path / "model.gguf", GGUF("Q8_0", exact=True), 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "target", [GPTQDirectory(), AWQDirectory(), CompressedTensors(), CompressedTensors(asymmetric=True)], ids=repr
)
def test_every_matrix_is_fitted_once(
    checkpoint: Callable[..., Path], tmp_path: Path, target: IntegerTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    monkeypatch.setattr("elastiq.foreign.integer.refit", lambda *args: fitted.append(refit(*args)) or fitted[-1])
    export(checkpoint(), tmp_path / "out", target, 4)
    assert len(fitted) == len(CheckpointReader(checkpoint()).manifest.matrices)


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
        ("qwen3_moe", GGUF(), "the architecture 'qwen3_moe' cannot be written; known: gemma, gemma2, gemma3_text, "),
        ("llama", GGUF("Q9_Z"), "unknown type Q9_Z; known: Q8_0"),
        ("gpt2", GPTQDirectory(), "c_attn is no ordinary linear layer; export to hf or gguf"),
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
