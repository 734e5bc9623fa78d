"""The plugin for vLLM, against stand-ins of the classes that its documentation names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from safetensors.torch import load_file
from tiny import build_model, make_model
from torch import Tensor, nn

import elastiq
from elastiq import ElastiqError
from elastiq.checkpoint import CheckpointReader
from elastiq.runtime import nested_matrices

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Parameter(nn.Parameter):
    """vLLM's parameters know their dimensions and how they are loaded."""

    def __new__(cls, *, data: Tensor, **kwargs: Any) -> Parameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, *, data: Tensor, weight_loader: Any, input_dim: int, output_dim: int, **packed: int) -> None:
        self.weight_loader, self.input_dim, self.output_dim, self.packed = weight_loader, input_dim, output_dim, packed


class Base:
    """QuantizationConfig, LinearMethodBase and QuantizeMethodBase as far as the plugin calls them."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class Linear(nn.Module):
    """A layer as vLLM builds it: its method makes the parameters, shards arrive by name."""

    def __init__(self, config: Any, prefix: str, inputs: int, outputs: list[int], parts: int = 1) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, inputs // parts, outputs, inputs, sum(outputs), torch.float32, weight_loader=self.load
        )

    @staticmethod
    def load(parameter: Parameter, array: Tensor, begin: int) -> None:
        assert parameter.output_dim == 0 and parameter.input_dim == 1
        parameter.data[begin : begin + len(array)] = array


class Embedding(Linear):
    pass


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    registered: dict[str, type] = {}
    contents: dict[str, dict[str, Any]] = {
        "layers.linear": {"LinearBase": Linear, "LinearMethodBase": Base},
        "layers.quantization": {"register_quantization_config": lambda n: lambda c: registered.setdefault(n, c)},
        "layers.quantization.base_config": {"QuantizationConfig": Base, "QuantizeMethodBase": Base},
        "layers.vocab_parallel_embedding": {"VocabParallelEmbedding": Embedding},
        "parameter": {"GroupQuantScaleParameter": Parameter, "PackedvLLMParameter": Parameter},
    }
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in contents.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, f"vllm.model_executor.{name}", module)
    module = importlib.import_module("elastiq.integrations.vllm")
    module.register()
    assert registered == {"elastiq": module.ElastiqConfig}
    yield module
    sys.modules.pop("elastiq.integrations.vllm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vllm")
    source = make_model("llama", directory / "source", tie_word_embeddings=True)
    write_random(
        build_model("llama", tie_word_embeddings=True), source, directory / "nested", embeddings=True, group_size=32
    )
    return directory / "nested"


def config_of(plugin: ModuleType, path: Path, **settings: Any) -> Any:
    config = plugin.ElastiqConfig.from_config({**CheckpointReader(path).config["quantization_config"], **settings})
    config.packed_modules_mapping = FUSED
    return config


def filled(layer: Linear, path: Path, names: list[str], columns: slice = slice(None)) -> Linear:
    """All arrays of the checkpoint, by the names vLLM maps them to; then what vLLM calls when all are there."""
    begin = 0
    arrays = {k: v for file in path.glob("plane-*.safetensors") for k, v in load_file(file).items()}
    for name in names:
        for key, parameter in layer.named_parameters():
            array, packed = arrays[f"{name}.{key}"], 8 if parameter.packed else 32
            cut = slice(None) if columns == slice(None) else slice(columns.start // packed, columns.stop // packed)
            parameter.weight_loader(parameter, array[:, cut], begin)
        begin += len(array)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("bits", [None, 3])
def test_fused_layers_multiply_as_ours(plugin: ModuleType, checkpoint: Path, bits: int | None) -> None:
    config = config_of(plugin, checkpoint, **({"bits": bits} if bits else {}))
    names = [f"model.layers.0.self_attn.{part}" for part in FUSED["qkv_proj"]]
    layer = Linear(config, "model.layers.0.self_attn.qkv_proj", 64, [64, 32, 32])
    filled(layer, checkpoint, names)
    assert not list(layer.named_parameters()) and layer.nested.max_bits == (bits or 8)
    ours = nested_matrices(elastiq.load(checkpoint, bits))
    x, bias = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.arange(128.0)
    expected = torch.cat([ours[name].product(x, None) for name in names], dim=-1)
    assert torch.allclose(layer.quant_method.apply(layer, x), expected, atol=1e-5)
    assert torch.allclose(layer.quant_method.apply(layer, x, bias), expected + bias, atol=1e-4)


def test_inputs_cut_over_devices_add_up(plugin: ModuleType, checkpoint: Path) -> None:
    name, config = "model.layers.0.self_attn.o_proj", config_of(plugin, checkpoint)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    halves = []
    for part in (slice(0, 32), slice(32, 64)):
        layer = filled(Linear(config, name, 64, [64], parts=2), checkpoint, [name], part)
        halves.append(layer.quant_method.apply(layer, x[:, part]))
    expected = nested_matrices(elastiq.load(checkpoint))[name].product(x, None)
    assert torch.allclose(halves[0] + halves[1], expected, atol=1e-3)
    with pytest.raises(ElastiqError, match="cut to 16 inputs splits a group of 32; use fewer devices"):
        Linear(config, name, 64, [64], parts=4)


def test_tied_embedding(plugin: ModuleType, checkpoint: Path) -> None:
    """The table is padded beyond the vocabulary; head and embedding are one."""
    config = config_of(plugin, checkpoint)
    layer = filled(Embedding(config, "model.embed_tokens", 64, [320]), checkpoint, ["model.embed_tokens"])
    ours, ids = nested_matrices(elastiq.load(checkpoint))["model.embed_tokens"], torch.tensor([[3, 259], [0, 7]])
    assert torch.equal(layer.quant_method.embedding(layer, ids), ours(ids))
    head = layer.quant_method.tie_weights(Embedding(config, "model.embed_tokens", 64, [320]), layer)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    logits = head.quant_method.apply(head, x)
    assert torch.allclose(logits[:, :260], ours.product(x, None), atol=1e-4) and not logits[:, 260:].any()


def test_what_is_not_quantized_and_what_cannot_be(plugin: ModuleType, checkpoint: Path) -> None:
    config = config_of(plugin, checkpoint)
    assert config.get_quant_method(nn.Module(), "model.norm") is None
    with pytest.raises(ElastiqError, match="at 1, 2, 3, 4, 5, 6, 7, 8 bits, not 9"):
        config_of(plugin, checkpoint, bits=9)
    del config.manifest.matrices["model.layers.0.mlp.up_proj"]
    with pytest.raises(ElastiqError, match="are not quantized alike"):
        config.get_quant_method(nn.Module(), "model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize("recipe", [elastiq.recipes.get("rtn", levels=(4,), rotate=True), elastiq.recipes.mx()])
def test_more_than_codes_is_refused(plugin: ModuleType, tmp_path: Path, recipe: elastiq.Recipe) -> None:
    source = make_model("llama", tmp_path / "source")
    elastiq.quantize(source, tmp_path / "out", recipe, num_samples=2, seq_len=32)
    with pytest.raises(ElastiqError, match=r"o_proj is more than nested codes .* such as nested"):
        config_of(plugin, tmp_path / "out").get_quant_method(nn.Module(), "model.layers.0.self_attn.o_proj")


def test_entry_point() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "elastiq"]
    assert not found or found[0].value == "elastiq.integrations.vllm:register"
