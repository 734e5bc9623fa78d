"""A checkpoint as a transformers model."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import sites_of, write_random
from tiny import FAMILIES, MOE_FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from elastiq.checkpoint import slice_checkpoint
from elastiq.core import ElastiqError, QuantizedWeight
from elastiq.inference.loading import bits_per_weight, bytes_in_memory, load, set_bits
from elastiq.linalg import native
from elastiq.runtime import NestedEmbedding, NestedExperts, NestedLinear, TiedHead, nested_matrices

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def twin_of_the_kernels() -> Iterator[None]:
    """What is loaded is compared closely, so activations stay floats."""
    native.use("torch")
    yield
    native.use(None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[..., Any]:
    """(path, model in 16 bits, random weights) of a family's tiny model, made once."""
    made: dict[Any, Any] = {}

    def get(family: str, embeddings: bool = False, **options: Any) -> tuple[Path, Any, dict[str, QuantizedWeight]]:
        key = (family, embeddings, *sorted(options.items()))
        if key not in made:
            source = tiny_model(family)
            model = AutoModelForCausalLM.from_pretrained(source)
            output = tmp_path_factory.mktemp("load") / family
            made[key] = output, model, write_random(model, source, output, embeddings=embeddings, **options)
        return made[key]

    return get


def filled(model: Any, weights: dict[str, QuantizedWeight], embeddings: bool, bits: dict[str, int] | int) -> Any:
    """The 16-bit model with decoded weights in the place of its own, float32."""
    twin = copy.deepcopy(model).float()
    twin.config._experts_implementation = "eager"
    with torch.no_grad():
        for site in sites_of(twin, embeddings):
            width = bits if isinstance(bits, int) else bits[site.tensor]
            values = weights[site.name].dequantize(width)
            if site.expert is not None:
                twin.get_parameter(site.tensor)[site.expert] = values
            else:
                module = twin.get_submodule(site.name)
                module.weight.copy_(values.T if isinstance(module, Conv1D) else values)
    return twin


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embeddings", [False, True])
@torch.no_grad()
def test_it_is_the_model_with_decoded_weights(checkpoint: Callable[..., Any], family: str, embeddings: bool) -> None:
    path, full, weights = checkpoint(family, embeddings)
    model = load(path, bits=3, max_bits=8, dtype=torch.float32)
    assert type(model) is type(full)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for bits in (3, 8, 5, 1):
        set_bits(model, bits)
        expected = filled(full, weights, embeddings, bits)(IDS).logits
        assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)
        native.use(None)
        if family not in MOE_FAMILIES:  # where a tie between experts may fall either way
            assert float((model(IDS).logits - expected).norm() / expected.norm()) < 1e-3
        native.use("torch")
    tokens = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_modules(checkpoint: Callable[..., Any], family: str) -> None:
    path, _, _ = checkpoint(family)
    model = load(path, bits=2)
    experts = [module for module in model.modules() if isinstance(module, NestedExperts)]
    assert len(experts) == 4
    name = experts[0].stored.name
    set_bits(model, {name: 1})
    assert experts[0].bits == 1
    with pytest.raises(ElastiqError, match=f"experts of one tensor share a width; set {name}"):
        set_bits(model, {f"{name}.0": 1})


def test_tied_and_untied_heads(checkpoint: Callable[..., Any]) -> None:
    tied = load(checkpoint("gemma3", True)[0], bits=2)
    assert isinstance(tied.get_input_embeddings(), NestedEmbedding)
    assert isinstance(tied.get_output_embeddings(), TiedHead)
    untied = load(checkpoint("llama", True)[0], bits=2)
    assert isinstance(untied.get_output_embeddings(), NestedLinear)
    plain = load(checkpoint("gemma3", False)[0], bits=2, dtype=torch.float32)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_weights_stored_apart_are_not_tied(tmp_path: Path) -> None:
    """config.json says tied, the checkpoint holds two different tables."""
    source = make_model("llama", tmp_path / "source")
    full = AutoModelForCausalLM.from_pretrained(source)
    weights = write_random(full, source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load(tmp_path / "out", bits=8, dtype=torch.float32, verify=False)
    expected = filled(full, weights, False, 8)(IDS).logits
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_only_the_planes_needed_are_read(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama")[0], tmp_path / "out")
    for plane in range(4, 9):
        file = path / f"plane-{plane}.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        file.write_bytes(file.read_bytes()[:header] + b"\xff" * (file.stat().st_size - header))
    model = load(path, bits=3)
    assert {module.max_bits for module in nested_matrices(model).values()} == {3}
    assert bits_per_weight(model) == 4.0
    with pytest.raises(ElastiqError, match=r"plane-4\.safetensors: altered"):
        set_bits(model, 4)
    assert {module.bits for module in nested_matrices(model).values()} == {3}


def test_set_bits(checkpoint: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    path, full, weights = checkpoint("llama")
    model = load(path, bits=3, max_bits=4, dtype=torch.float32)
    matrices = nested_matrices(model)
    with caplog.at_level(logging.INFO, "elastiq"):
        set_bits(model, 4)
        set_bits(model, 2)
        assert not caplog.records
        before = bytes_in_memory(model)
        set_bits(model, 6)
        (record,) = caplog.records
        assert record.getMessage().startswith(f"planes 5 to 6 of 14 matrices read from {path} (")
        assert bytes_in_memory(model) > before
        assert bits_per_weight(model) == 7.0
        set_bits(model, 5)
        set_bits(model, 6)
        assert len(caplog.records) == 2
        assert "5 bits have no scales of their own and borrow those of 4" in caplog.records[1].getMessage()
    name = "model.layers.1.mlp.down_proj"
    set_bits(model, {name: 8})
    assert {n: m.bits for n, m in matrices.items()} == {**dict.fromkeys(matrices, 6), name: 8}
    assert {n: m.max_bits for n, m in matrices.items()} == {**dict.fromkeys(matrices, 6), name: 8}
    expected = filled(full, weights, False, {**dict.fromkeys(matrices, 6), name: 8})(IDS).logits
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_widths_per_matrix(checkpoint: Callable[..., Any]) -> None:
    path, full, weights = checkpoint("llama")
    name = "model.layers.0.self_attn.q_proj"
    model = load(path, bits={name: 2}, dtype=torch.float32)
    matrices = nested_matrices(model)
    assert matrices[name].bits == matrices[name].max_bits == 2
    assert {m.bits for n, m in matrices.items() if n != name} == {8}
    expected = filled(full, weights, False, {n: m.bits for n, m in matrices.items()})(IDS).logits
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    assert {m.bits for m in nested_matrices(load(path)).values()} == {8}


def test_requests_that_cannot_be_met(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path, full, _ = checkpoint("llama")
    for bits in (0, 9):
        with pytest.raises(ElastiqError, match=f"it can be read at 1 to 8 bits, not {bits}; ask for one of these"):
            load(path, bits=bits)
    with pytest.raises(ElastiqError, match="it can be read at 1 to 8 bits, not 12"):
        load(path, bits=3, max_bits=12)
    with pytest.raises(ElastiqError, match=r"model\.layers\.7: no quantized matrix of .* names are like model\.layers"):
        load(path, bits={"model.layers.7": 3})
    slice_checkpoint(path, 3, tmp_path / "small")
    with pytest.raises(ElastiqError, match="it can be read at 1 to 3 bits, not 4; ask for one of these"):
        load(tmp_path / "small", bits=4)
    model = load(tmp_path / "small")
    assert {module.bits for module in nested_matrices(model).values()} == {3}
    name = next(iter(nested_matrices(model)))
    for request in (4, {name: 4}, {name: 2, "other": 2}):
        with pytest.raises(ElastiqError):
            set_bits(model, request)
        assert {module.bits for module in nested_matrices(model).values()} == {3}
    (tmp_path / "small" / "plane-3.safetensors").unlink()
    two = load(tmp_path / "small", bits=2)
    with pytest.raises(ElastiqError, match=r"at 1 or 2 bits, not 3; copy plane-3\.safetensors beside the others"):
        set_bits(two, 3)
    with pytest.raises(ElastiqError, match=r"set_bits: this model has no nested planes; load it with elastiq\.load"):
        set_bits(full, 3)


def test_planes_that_vanish_while_the_model_runs(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama")[0], tmp_path / "out")
    model = load(path, bits=2, max_bits=4)
    for plane in range(1, 9):
        (path / f"plane-{plane}.safetensors").unlink()
    set_bits(model, 4)
    assert torch.isfinite(model(IDS).logits).all()
    with pytest.raises(ElastiqError, match=r"plane-5\.safetensors is missing; copy it beside the others"):
        set_bits(model, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_dtypes(checkpoint: Callable[..., Any], dtype: torch.dtype | None) -> None:
    model = load(checkpoint("llama", True)[0], bits=4, dtype=dtype)
    assert model.dtype == (dtype or torch.float32)
    assert model(IDS).logits.dtype == model.dtype
    assert model.config.dtype == model.dtype


def test_memory_is_counted(checkpoint: Callable[..., Any]) -> None:
    path, full, _ = checkpoint("llama")
    assert bytes_in_memory(full) > 1.3 * bytes_in_memory(load(path, bits=3, dtype=torch.float16))
    weights = sum(module.stored.num_weights for module in nested_matrices(load(path)).values())
    bare = load(path, bits=1)
    more = load(path, bits=1, max_bits=2)
    assert bytes_in_memory(more) - bytes_in_memory(bare) == weights // 8
    quantized = load(checkpoint("llama", True)[0], bits=3)
    assert bytes_in_memory(quantized) < 0.6 * bytes_in_memory(load(path, bits=3))


def test_generation_settings_and_tokenizer_travel(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("llama")[0], tmp_path / "out")
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.25, "do_sample": True}))
    assert load(path, bits=2, verify=False).generation_config.temperature == 0.25
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    assert AutoConfig.from_pretrained(path).quantization_config["quant_method"] == "elastiq"


def test_files_that_do_not_belong_together(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    def broken(change: Callable[[dict[str, Any]], None]) -> Path:
        path = shutil.copytree(checkpoint("llama")[0], tmp_path / "out", dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))
        return path

    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda c: c.update(model_type="not-a-model"), "cannot read config.json of the architecture 'not-a-model'"),
        (lambda c: c.update(model_type="vit"), "no causal language model of its config.json"),
        (lambda c: c.update(intermediate_size=128), "the checkpoint holds"),
        (lambda c: c.update(vocab_size=100), "in base.safetensors, config.json says"),
        (lambda c: c.update(num_hidden_layers=3), "base.safetensors lacks model.layers.2"),
        (lambda c: c.update(num_hidden_layers=1), "has no such matrix; the files do not belong together"),
        (lambda c: c["quantization_config"].update(planes=7), "which cannot be|does not fit config.json"),
    ]
    for change, sentence in cases:
        with pytest.raises(ElastiqError, match=sentence):
            load(broken(change), bits=2, verify=False)
    with pytest.raises(ElastiqError, match=r"config\.json: altered"):
        load(broken(lambda c: c.update(vocab_size=100)), bits=2)


def test_symmetric_and_single_level(checkpoint: Callable[..., Any]) -> None:
    path, full, weights = checkpoint("llama", levels=(4,), symmetric=True)
    model = load(path, dtype=torch.float32)
    assert bits_per_weight(model) == 4.5
    expected = filled(full, weights, False, 4)(IDS).logits
    assert torch.allclose(model(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ElastiqError, match="it can be read at 4 bits, not 3"):
        load(path, bits=3)


@pytest.mark.parametrize("bits", [None, 5])
def test_a_quantized_table_is_not_resized(checkpoint: Callable[..., Any], bits: int | None) -> None:
    model = load(checkpoint("llama", embeddings=True)[0], bits)
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(ElastiqError, match=r"embed_tokens: a quantized embedding table keeps its size; resize"):
            again.resize_token_embeddings(300)
    full = load(checkpoint("llama")[0], bits)
    full.resize_token_embeddings(300, mean_resizing=False)
    assert full(IDS).logits.shape[-1] == 300


@pytest.mark.parametrize("embeddings", [False, True])
def test_copies_answer_alike_and_are_set_apart(
    checkpoint: Callable[..., Any], embeddings: bool, tmp_path: Path
) -> None:
    """A deep copy and a pickled model have the same planes, and widths of their own; planes not held are still read."""
    model = load(checkpoint("llama", embeddings=embeddings)[0], 3)
    wide = load(checkpoint("llama", embeddings=embeddings)[0], 5)(IDS).logits
    torch.save(model, tmp_path / "model.pt")
    before = model(IDS).logits
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(other(IDS).logits, before)
        set_bits(other, 5)
        assert torch.equal(other(IDS).logits, wide) and torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_answers_in_its_dtype(checkpoint: Callable[..., Any], dtype: torch.dtype) -> None:
    path = checkpoint("llama", embeddings=True)[0]
    expected = load(path, 4)(IDS).logits
    logits = load(path, 4).to(dtype)(IDS).logits
    assert logits.dtype == dtype
    assert float((logits.double() - expected).norm() / expected.norm()) < 50 * max(torch.finfo(dtype).eps, 1e-5)


def test_gradients_pass_through_with_checkpointing(checkpoint: Callable[..., Any]) -> None:
    model = load(checkpoint("llama")[0], 4)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        scale = model.model.layers[0].input_layernorm.weight.requires_grad_()
        scale.grad = None
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(scale.grad.clone())
    assert found[0].abs().sum() > 0 and torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-7)
