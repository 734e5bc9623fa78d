"""Folds that norms and matrices before take over: what a block computes does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from elastiq import Recipe, load, quantize, recipes
from elastiq.checkpoint import CheckpointReader
from elastiq.core import Fold
from elastiq.foreign.exporting import GPTQDirectory, export
from elastiq.formats import Integer
from elastiq.models import ModelSource, build_skeleton, discover
from elastiq.parts import Diagonal, Hadamard
from elastiq.pipeline.absorption import absorb
from elastiq.pipeline.stream import BlockStream
from elastiq.runtime import nested_matrices
from elastiq.solvers import RoundToNearest
from elastiq.transforms import ActivationAware, SmoothQuant

IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))
EXPECTED = {
    "llama": {"q_proj", "gate_proj", "down_proj"},
    "qwen2": {"q_proj", "gate_proj", "down_proj"},
    "gpt2": {"c_attn", "c_fc"},
    "mixtral": {"q_proj"},
    "gemma2": {"down_proj"},
}
"""Inputs whose divisors something before can take: not a norm of gemma (1 + weight), nor values that heads share."""


def random_diagonal(width: int, seed: int) -> Diagonal:
    return Diagonal.of(torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed))))


@pytest.mark.parametrize("family", EXPECTED)
def test_a_block_computes_what_it_did(family: str, tiny_model: Callable[[str], Path]) -> None:
    source = ModelSource(tiny_model(family))
    model = build_skeleton(source, torch.float32)
    layout = discover(model)
    stream = BlockStream(model, source, layout, IDS, frozenset())
    for block in range(len(layout.blocks)):
        sites = layout.at(block)
        widths = {site.input_id: site.shape[1] for site in sites}
        folds: dict[str, tuple[Fold, ...]] = {
            name: (random_diagonal(width, number),) for number, (name, width) in enumerate(widths.items())
        }
        found = absorb(stream, block, sites, folds)
        assert {name.rpartition(".")[2] for name in found.inputs} == EXPECTED[family]
        factors = dict(found.factors)
        for site in sites:
            name, turned = f"{site.name}.weight", site.role == "conv1d"
            inner = folds[site.input_id][0].divisor() if site.input_id in found.inputs else None
            for by, here in ((found.rows.get(site.name), False), (inner, True)):
                if by is not None:
                    by = by if here else 1 / by
                    factors[name] = factors.get(name, torch.ones(())) * (by if here != turned else by[:, None])
        assert stream.unchanged(block, factors, tolerance=1e-4), "all of them together"
        some = f"{next(iter(found.inputs))}.weight"
        wrong = {some: factors[some].square()}
        assert not stream.unchanged(block, factors | wrong), "a change is noticed"
        stream.advance(block)


def test_a_rotation_stays_where_it_is(tiny_model: Callable[[str], Path]) -> None:
    source = ModelSource(tiny_model("llama"))
    model = build_skeleton(source, torch.float32)
    layout = discover(model)
    stream = BlockStream(model, source, layout, IDS, frozenset())
    sites = layout.at(0)
    folds = {site.input_id: (Hadamard.of(torch.arange(site.shape[1]) % 3 == 0),) for site in sites}
    assert not absorb(stream, 0, sites, folds).inputs


@pytest.mark.parametrize("inputs", ["full", "quantized"])
@pytest.mark.parametrize("transform", [ActivationAware(steps=4), SmoothQuant()], ids=str)
def test_a_checkpoint_holds_the_changed_norms(
    transform: ActivationAware | SmoothQuant, inputs: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model("llama")
    recipe = Recipe(Integer((8,), 32), RoundToNearest(), inputs=inputs, transforms=(transform,))
    quantize(source, tmp_path / "out", recipe, IDS)
    model, full = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    behind = {name.rpartition(".")[2] for name, m in nested_matrices(model).items() if m.stored.parts}
    assert behind == {"o_proj"}
    before, after = full.model.layers[1].input_layernorm.weight, model.model.layers[1].input_layernorm.weight
    assert not torch.allclose(before, after, rtol=0.01)
    with torch.no_grad():
        logits, expected = model(IDS).logits, full(IDS).logits
    assert float((logits - expected).square().mean()) < 2e-3 * float(expected.square().mean())
    assert all(row["levels"]["8"]["error"] < 1e-3 for row in CheckpointReader(tmp_path / "out").table)


def test_what_is_wholly_absorbed_is_exported_like_any_other(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "full", num_key_value_heads=4)
    quantize(tmp_path / "full", tmp_path / "out", recipes.awq(group_size=32), IDS)
    assert not any(m.stored.parts for m in nested_matrices(load(tmp_path / "out")).values())
    export(tmp_path / "out", tmp_path / "gptq", GPTQDirectory(), 4)
