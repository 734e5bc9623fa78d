"""Blocks, matrices, what feeds them and what is left out, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from elastiq.core import ElastiqError
from elastiq.models import Layout, ModelSource, build_skeleton, discover

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = [QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
EXPERTS = [(f"mlp.experts.{name}.{e}",) for name in ("gate_up_proj", "down_proj") for e in range(4)]
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "gpt_neox": [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    "opt": [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "mixtral": [QKV, ("self_attn.o_proj",), *EXPERTS],
    "qwen3_moe": [QKV, ("self_attn.o_proj",), *EXPERTS],
}
"""Matrices of a block, grouped by the input they share."""


def layout_of(directory: Path) -> Layout:
    return discover(build_skeleton(ModelSource(directory), torch.float32))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_matrices_and_their_inputs(family: str, tiny_model: Callable[[str], Path]) -> None:
    layout = layout_of(tiny_model(family))
    assert len(layout.blocks) == (3 if family == "gemma3" else 2)
    for index, block in enumerate(layout.blocks):
        groups: dict[str, set[str]] = {}
        for site in layout.at(index):
            assert site.block == index
            groups.setdefault(site.input_id, set()).add(site.name.removeprefix(f"{block}."))
        expected = GROUPS.get(family, GATED)
        assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))
        assert all(leader.removeprefix(f"{block}.") in group for leader, group in groups.items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_matrix_of_the_model_is_accounted_for_once(family: str, tiny_model: Callable[[str], Path]) -> None:
    model = build_skeleton(ModelSource(tiny_model(family)), torch.float32)
    layout = discover(model)
    named = [site.tensor for site in (*layout.sites, *layout.outer) if not site.expert] + list(layout.skipped)
    matrices = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.dim() > 1}
    assert sorted(named) == sorted(matrices)
    for site in (*layout.sites, *layout.outer):
        rows, columns = matrices[site.tensor].shape[-2:]
        assert site.shape == ((columns, rows) if site.role == "conv1d" else (rows, columns))
    assert sum(s.num_weights for s in layout.sites) == sum(
        p.numel() for name, p in matrices.items() if name in {site.tensor for site in layout.sites}
    )


def test_roles_and_shapes_of_unusual_matrices(tiny_model: Callable[[str], Path]) -> None:
    gpt2 = {site.name: site for site in layout_of(tiny_model("gpt2")).sites}
    assert gpt2["transformer.h.0.attn.c_attn"].role == "conv1d"
    assert gpt2["transformer.h.0.attn.c_attn"].shape == (192, 64)
    layout = layout_of(tiny_model("mixtral"))
    expert = next(site for site in layout.sites if site.name == "model.layers.1.mlp.experts.down_proj.3")
    assert (expert.role, expert.expert, expert.shape) == ("expert", 3, (64, 96))
    assert expert.tensor == "model.layers.1.mlp.experts.down_proj"
    assert layout.skipped == {f"model.layers.{i}.mlp.gate": "router to 4 experts" for i in range(2)}


def test_embedding_and_head(tiny_model: Callable[[str], Path]) -> None:
    apart, tied = layout_of(tiny_model("llama")), layout_of(tiny_model("gpt2"))
    assert (apart.embedding, apart.head, apart.tied) == ("model.embed_tokens", "lm_head", False)
    assert [(s.name, s.role, s.block) for s in apart.at(-1)] == [
        ("model.embed_tokens", "embedding", -1),
        ("lm_head", "head", -1),
    ]
    assert (tied.embedding, tied.head, tied.tied) == ("transformer.wte", "lm_head", True)
    assert [(s.name, s.shape) for s in tied.outer] == [("transformer.wte", (tiny.VOCAB, tiny.HIDDEN))]
    assert tied.skipped == {"transformer.wpe": "outside the decoder blocks"}


def small(family: str, **settings: object) -> nn.Module:
    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64, **settings
    )
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


def test_gates_and_routers_are_skipped() -> None:
    layout = discover(small("qwen2_moe", num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=48))
    assert layout.skipped["model.layers.0.mlp.shared_expert_gate"] == "a gate with one output"
    assert layout.skipped["model.layers.0.mlp.gate"] == "router to 4 experts"
    shared = [site for site in layout.at(0) if "shared_expert." in site.name]
    assert len({site.input_id for site in shared}) == 2


def test_a_weight_used_without_its_layer_is_skipped() -> None:
    layout = discover(small("mamba", state_size=8))
    assert layout.skipped["backbone.layers.0.mixer.dt_proj"] == "its weight is used without calling its layer"
    assert {site.name.rpartition(".")[2] for site in layout.sites} == {"in_proj", "x_proj", "out_proj"}


def test_transposed_experts() -> None:
    model = small("gpt_oss", num_local_experts=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    layout = discover(model)  # type: ignore[arg-type]
    experts = {site.name: (site.role, site.shape) for site in layout.at(0) if site.expert is not None}
    assert len(experts) == 8
    assert experts["model.layers.0.mlp.experts.gate_up_proj.3"] == ("expert_transposed", (192, 64))
    assert experts["model.layers.0.mlp.experts.down_proj.0"] == ("expert_transposed", (64, 96))
    assert layout.skipped["model.layers.0.mlp.router"] == "router to 4 experts"


def test_linear_layers_of_a_class_of_their_own_are_tried() -> None:
    class Plain(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + self.bias

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = small("llama", num_attention_heads=4)
    with torch.device("meta"):
        model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj = Plain(64, 96), Doubled(64, 96)
    layout = discover(model)  # type: ignore[arg-type]
    assert "model.layers.0.mlp.up_proj" in {site.name for site in layout.at(0)}
    assert layout.skipped["model.layers.0.mlp.gate_proj"] == "Doubled computes in a way of its own"


def test_experts_that_are_not_multiplied_one_at_a_time_are_refused_by_name() -> None:
    model = small("llama4_text", num_local_experts=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ElastiqError, match="Llama4TextExperts does not multiply by the experts"):
        discover(model)  # type: ignore[arg-type]


def test_one_block_used_several_times_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model = build_skeleton(ModelSource(tiny_model("llama")), torch.float32)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ElastiqError, match=r"model\.layers uses one block several times"):
        discover(model)


def test_a_model_without_blocks_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model = build_skeleton(ModelSource(tiny_model("llama")), torch.float32)
    model.model.layers = nn.ModuleList()
    with pytest.raises(ElastiqError, match="LlamaForCausalLM cannot be quantized: it has no list of decoder blocks"):
        discover(model)
