"""Weights loaded part by part equal those that transformers loads, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elastiq.core import ElastiqError
from elastiq.models import ModelSource, build_skeleton, free_module, load_module
from elastiq.models.source import TensorReader


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loaded_in_parts_equals_from_pretrained(family: str, tiny_model: Callable[[str], Path]) -> None:
    source = ModelSource(tiny_model(family))
    model = build_skeleton(source, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training
    for name, module in reversed(list(model.named_modules())):
        if next(module.parameters(recurse=False), None) is not None:
            load_module(model, name, source, torch.float32, "cpu", recurse=False)
    expected = reference(source.path)
    assert_same(model, expected)
    ids = torch.randint(tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_block_is_loaded_alone_and_freed(
    family: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TensorReader.read

    def record(self: TensorReader, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(TensorReader, "read", record)
    source = ModelSource(tiny_model(family))
    model = build_skeleton(source, torch.float32)
    read.clear()
    block = next(name for name, _ in model.named_modules() if name.endswith((".layers.1", ".h.1")))
    load_module(model, block, source, torch.float32, "cpu")
    assert read and all(f"{block.rpartition('.')[2]}." in name and name.startswith(block) for name in read)
    loaded = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert loaded == {name for name, _ in model.named_parameters() if name.startswith(f"{block}.")}
    read.clear()
    load_module(model, block, source, torch.float32, "cpu")
    assert not read
    free_module(model, block)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_stored_and_wanted_precision(stored: torch.dtype, tmp_path: Path) -> None:
    source = ModelSource(tiny.make_model("qwen2", tmp_path, dtype=stored))
    for wanted in (torch.float32, torch.bfloat16, torch.float16):
        model = build_skeleton(source, wanted)
        load_module(model, "", source, wanted, "cpu")
        assert_same(model, reference(source.path, wanted))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sharded_model(family: str, tmp_path: Path) -> None:
    source = ModelSource(tiny.make_model(family, tmp_path, max_shard_size="60KB"))
    assert len(source.shards) > 2
    model = build_skeleton(source, torch.float32)
    load_module(model, "", source, torch.float32, "cpu")
    assert_same(model, reference(tmp_path))


def test_base_model_prefix_may_be_absent(tmp_path: Path) -> None:
    directory = tiny.make_model("gpt2", tmp_path)
    rewrite(directory, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    source = ModelSource(directory)
    assert "h.0.attn.c_attn.weight" in source.tensor_files
    model = build_skeleton(source, torch.float32)
    load_module(model, "", source, torch.float32, "cpu")
    assert_same(model, reference(directory))


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_one_object(stored_as: str, tmp_path: Path) -> None:
    directory = tiny.make_model("llama", tmp_path, tie_word_embeddings=True)
    rewrite(directory, lambda t: {stored_as if name == "model.embed_tokens.weight" else name: t[name] for name in t})
    source = ModelSource(directory)
    model = build_skeleton(source, torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    load_module(model, "lm_head", source, torch.float32, "cpu")
    assert embedding.weight is head.weight and not head.weight.is_meta
    assert torch.equal(head.weight, reference(directory).get_output_embeddings().weight)
    free_module(model, "model.embed_tokens")
    assert embedding.weight is head.weight and head.weight.is_meta


@pytest.mark.parametrize("equal", [True, False])
def test_a_checkpoint_may_disagree_with_the_tie(equal: bool, tmp_path: Path) -> None:
    directory = tiny.make_model("llama", tmp_path, tie_word_embeddings=True)

    def add_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * (1 if equal else 2)}

    rewrite(directory, add_head)
    source = ModelSource(directory)
    model = build_skeleton(source, torch.float32)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == equal
    load_module(model, "", source, torch.float32, "cpu")
    assert_same(model, reference(directory))


def test_encoder_decoder_is_refused(tiny_model: Callable[[str], Path]) -> None:
    source = ModelSource(tiny_model("llama"))
    source.config = AutoConfig.for_model("t5")
    with pytest.raises(ElastiqError, match="'t5' is an encoder-decoder model; only causal language models"):
        build_skeleton(source, torch.float32)


def test_a_model_without_language_head_is_refused(tiny_model: Callable[[str], Path]) -> None:
    source = ModelSource(tiny_model("llama"))
    source.config = AutoConfig.for_model("bert", architectures=["BertModel"])
    with pytest.raises(ElastiqError, match="the architecture BertModel is not a causal language model"):
        build_skeleton(source, torch.float32)
    source.config = AutoConfig.for_model("vit", architectures=["ViTForImageClassification"])
    with pytest.raises(ElastiqError, match="has no causal language model for the architecture 'vit'"):
        build_skeleton(source, torch.float32)
