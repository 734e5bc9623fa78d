"""A GGUF file becomes a model that is what the file says, or a sentence names what would be lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from safetensors.torch import load_file, save_file
from tiny import build_model, make_model
from transformers import AutoConfig, AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError
from elastiq.foreign.exporting import GGUF, export
from elastiq.foreign.gguf import importing
from elastiq.foreign.gguf.families import query_channels
from elastiq.foreign.importing import import_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
IDS = torch.arange(40).reshape(2, 20) * 3
SIX = {"num_hidden_layers": 6, "layer_types": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(checkpoint, its GGUF file) of a family on random codes, each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str = "llama", **settings: Any) -> tuple[Path, Path]:
        key = f"{family}{settings}"
        if key not in made:
            room = tmp_path_factory.mktemp(family)
            make_model(family, room / "source", **settings)
            _add_a_merge(room / "source/tokenizer.json")
            write_random(build_model(family, **settings), room / "source", room / "nested")
            export(room / "nested", room / "model.gguf", GGUF("Q8_0"), 8)
            made[key] = room / "nested", room / "model.gguf"
        return made[key]

    return get


def _add_a_merge(tokenizer: Path) -> None:
    """Transformers takes a vocabulary without merges for another kind of tokenizer."""
    data = json.loads(tokenizer.read_text())
    data["model"]["vocab"]["ab"] = 258
    data["model"]["merges"] = ["a b"]
    tokenizer.write_text(json.dumps(data))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def imported(file: Path, output: Path) -> Any:
    import_model(file, output)
    return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


def altered(file: Path, output: Path, keys: Mapping[str, Any], arrays: Mapping[str, torch.Tensor] | None = None
            ) -> Path:  # fmt: skip
    """`file` with other metadata (None takes a key away) and with further arrays."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(output, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in keys:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for key, value in keys.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in (arrays or {}).items():
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "rms_norm_eps": 1e-3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}}),
        ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 7.0}),
        ("gemma3", {**SIX, "final_logit_softcapping": 5.0}),
        ("gpt2", {}),
    ],
    ids=str,
)
def test_there_and_back(
    written: Callable[..., tuple[Path, Path]], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """Biases, caps, scaled positions and sizes of heads that transformers' own reader leaves out."""
    nested, file = written(family, **settings)
    assert difference(logits(imported(file, tmp_path / "out")), logits(elastiq.load(nested, 8))) < 0.03


def inverse_frequencies(model: Any) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq.double()


def plain(width: int = 16, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(0, width, 2).double() / width)


def test_llama_3_scales_positions(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Of its four numbers the file holds none, only what they make of each frequency."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    nested, file = written(head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    model = imported(file, tmp_path / "out")
    assert model.config.rope_parameters == rope
    assert difference(logits(model), logits(elastiq.load(nested, 8))) < 0.03


def test_other_factors_of_frequencies(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    factors = torch.tensor([1.0, 1.5, 1.25, 3.0, 7.0, 2.0, 9.0, 4.0])
    file = altered(written()[1], tmp_path / "a.gguf", {}, {"rope_freqs.weight": factors})
    model = imported(file, tmp_path / "out")
    assert torch.allclose(inverse_frequencies(model), plain() / factors.double(), rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == 1.0


def test_long_and_short_factors(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    short, long = 1 + torch.arange(8) / 8, 2 + torch.arange(8.0)
    keys = {"llama.rope.scaling.attn_factor": 1.25, "llama.rope.scaling.original_context_length": 64}
    arrays = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    model = imported(altered(written()[1], tmp_path / "a.gguf", keys, arrays), tmp_path / "out")
    assert torch.allclose(inverse_frequencies(model), plain() / short.double(), rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == 1.25
    with torch.inference_mode():
        model(input_ids=torch.arange(100).unsqueeze(0))
    assert torch.allclose(inverse_frequencies(model), plain() / long.double(), rtol=1e-6)


def test_yarn(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Against the formulas of ggml, in double precision: an angle is blended from the scaled and the plain one."""
    factor, original, width = 4.0, 64, 16
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": factor,
            "llama.rope.scaling.original_context_length": original}  # fmt: skip
    model = imported(altered(written()[1], tmp_path / "a.gguf", keys), tmp_path / "out")

    def place(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    start, end = max(0, math.floor(place(32.0))), min(width - 1, math.ceil(place(1.0)))
    mix = 1 - ((torch.arange(width // 2).double() - start) / max(0.001, end - start)).clamp(0, 1)
    wanted = plain() / factor * (1 - mix) + plain() * mix
    assert torch.allclose(inverse_frequencies(model), wanted, rtol=1e-6)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(1 + 0.1 * math.log(factor))


def test_legacy_and_gemma_3_scales(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    model = imported(altered(written()[1], tmp_path / "a.gguf", {"llama.rope.scale_linear": 2.0}), tmp_path / "out")
    assert torch.allclose(inverse_frequencies(model), plain() / 2, rtol=1e-6)
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base_swa": 2e4}
    file = written("gemma3", **SIX, final_logit_softcapping=5.0)[1]
    rope = imported(altered(file, tmp_path / "g.gguf", keys), tmp_path / "gemma").config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 2e4}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.attention.scale": 0.5}, r"nothing of a llama in transformers takes attention\.scale; take the"),
        ({"llama.expert_count": 8}, r"takes expert_count; "),
        ({"llama.attention.sliding_window": 64}, r"takes attention\.sliding_window; "),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count|head_dim"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, r"takes rope\.scaling\.yarn_log_multiplier; "),
        ({"llama.rope.scaling.type": "longrope"}, "a rotation scaled by 'longrope' with no arrays, a factor of 1 "),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"layer_norm_rms_epsilon is missing from its metadata"),
        ({"split.count": 3}, r"one of several parts of a model; merge them with gguf-split first"),
    ],
    ids=str,
)
def test_hyperparameters_that_nothing_reads(
    written: Callable[..., tuple[Path, Path]], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ElastiqError, match=message):
        import_model(altered(written()[1], tmp_path / "a.gguf", keys), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_file_leaves_out_is_what_llama_cpp_takes(
    written: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Not what transformers' configuration class takes."""
    nested, file = written("gemma2", query_pre_attn_scalar=16)
    keys = dict.fromkeys((
        "gemma2.attention.key_length", "gemma2.attention.value_length", "gemma2.rope.freq_base", "gemma2.vocab_size",
        "gemma2.attn_logit_softcapping", "gemma2.final_logit_softcapping",
    ))  # fmt: skip
    model = imported(altered(file, tmp_path / "a.gguf", keys), tmp_path / "out")
    assert difference(logits(model), logits(elastiq.load(nested, 8))) < 0.03


def test_arrays_that_nothing_reads(written: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    file = altered(written()[1], tmp_path / "a.gguf", {}, {"blk.1.attn_q_norm.weight": torch.ones(16)})
    with pytest.raises(ElastiqError, match=r"LlamaForCausalLM takes blk\.1\.attn_q_norm\.weight; take the model's own"):
        import_model(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_what_is_written_is_compared_with_the_file(
    written: Callable[..., tuple[Path, Path]], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of a matrix that a reader exchanges."""
    name = {"gpt2": "transformer.h.1.attn.c_attn.weight"}.get(family, "model.layers.1.self_attn.q_proj.weight")
    write = importing._write

    def wrongly(file: Path, config: object, work: Path) -> None:
        write(file, config, work)
        arrays = load_file(work / "model.safetensors")
        arrays[name] = arrays[name][[1, 0, *range(2, len(arrays[name]))]].contiguous()
        save_file(arrays, work / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(importing, "_write", wrongly)
    with pytest.raises(ElastiqError, match=rf"blk\.1\..*, {name}, hold different values"):
        import_model(written(family)[1], tmp_path / "out")


def test_queries_of_gemma_are_scaled_as_llama_cpp_does() -> None:
    small = AutoConfig.for_model("gemma2", num_hidden_layers=26, hidden_size=2304, num_attention_heads=8, head_dim=256)
    large = AutoConfig.for_model("gemma2", num_hidden_layers=46, hidden_size=4608, num_attention_heads=32, head_dim=128)
    assert (query_channels(small.to_dict()), query_channels(large.to_dict())) == (256, 144)
