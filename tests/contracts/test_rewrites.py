"""What every registered rewrite must do: parameters change, the model's function does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError, recipes
from elastiq.core import Edit, Edits, Recipe, ResidualStream, Rewrite, Step, step_from_dict
from elastiq.foreign.exporting import HuggingFace, export
from elastiq.formats import Integer
from elastiq.models import ModelSource, build_skeleton, load_module
from elastiq.parts import Hadamard
from elastiq.pipeline.rewriting import plan_rewrites
from elastiq.rewrites import ResidualRotation
from elastiq.solvers import RoundToNearest

CASES: list[Rewrite] = [ResidualRotation(), ResidualRotation(heads=False, seed=3)]
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {},  # norms of heads
    "phi3": {},  # queries, keys and values in one matrix, gate and up in another
}
IDS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(0))


def directory(family: str, tmp_path: Path) -> Path:
    return tiny.make_model(family.removesuffix("-tied"), tmp_path / "model", **FAMILIES[family])


def recipe(rewrite: Rewrite, levels: tuple[int, ...] = (8,)) -> Recipe:
    return Recipe(Integer(levels, 32), RoundToNearest(), rewrites=(rewrite,))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_every_registered_rewrite_has_a_case() -> None:
    assert set(Step.registry["rewrite"]) == {type(case).name for case in CASES}


@pytest.mark.parametrize("rewrite", CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_is_unchanged(family: str, rewrite: Rewrite, tmp_path: Path) -> None:
    """All weights read with the edits make a model with the logits of the original."""
    source = ModelSource(directory(family, tmp_path))
    edits = plan_rewrites(source, recipe(rewrite), IDS, "cpu")
    model = build_skeleton(source, torch.float32, edits)
    load_module(model, "", source, torch.float32, "cpu")
    plain = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-4 * float(logits(plain).abs().max()))
    changed = [name for name, values in plain.named_parameters() if not torch.equal(values, model.get_parameter(name))]
    assert "model.embed_tokens.weight" in changed and "model.layers.1.mlp.down_proj.weight" in changed
    assert step_from_dict("rewrite", rewrite.to_dict()) == rewrite


@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
def test_a_checkpoint_is_one_model(family: str, tmp_path: Path) -> None:
    """Statistics, codes, what stays in 16 bits, both loaders and an export see the rewritten model alike."""
    source = directory(family, tmp_path)
    elastiq.quantize(source, tmp_path / "out", replace(recipe(CASES[0]), embeddings=family == "qwen2"), IDS)
    full = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    export(tmp_path / "out", tmp_path / "hf", HuggingFace(), bits=8)
    for model in (
        elastiq.load(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32),
    ):
        assert float((logits(model) - full).norm() / full.norm()) < 0.04
    norm = elastiq.load(tmp_path / "out").get_parameter("model.norm.weight")
    assert torch.equal(norm, torch.ones_like(norm)), "the head's columns have the gain"
    if family == "llama-tied":
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_values_are_rotated_where_their_matrix_is_known(tmp_path: Path) -> None:
    source = ModelSource(directory("llama", tmp_path))
    edits = plan_rewrites(source, recipe(ResidualRotation()), IDS, "cpu")
    values, keys, output = (edits[f"model.layers.1.self_attn.{name}.weight"] for name in ("v_proj", "k_proj", "o_proj"))
    assert values.outputs == output.inputs is not None
    assert keys.outputs is None and keys.inputs == values.inputs, "keys are compared with queries, and stay"
    assert output.outputs == values.inputs


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "is a norm with more than a gain"),
        ("mixtral", r"the experts in .* are given the stream one at a time"),
        ("gemma2", r"the rewritten model differs from the model by .*% of its logits"),  # it norms what is added
    ],
)
def test_a_stream_that_cannot_be_rotated_is_refused(
    family: str, reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    sentence = rf"its residual stream cannot be rotated, because .*{reason}; rotate what .* \(--rotate\)"
    with pytest.raises(ElastiqError, match=sentence):
        elastiq.quantize(tiny_model(family), tmp_path / "out", recipe(CASES[0]), IDS)
    assert not (tmp_path / "out").exists()


def test_a_rewrite_that_forgets_a_parameter_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    plan = ResidualRotation.plan

    def forgetful(self: ResidualRotation, stream: ResidualStream) -> Edits:
        edits = dict(plan(self, stream))
        del edits["model.layers.1.mlp.down_proj.weight"]
        return edits

    monkeypatch.setattr(ResidualRotation, "plan", forgetful)
    with pytest.raises(ElastiqError, match="the rewritten model differs from the model by"):
        plan_rewrites(ModelSource(tiny_model("llama")), recipe(CASES[0]), IDS, "cpu")


def test_one_rewrite_at_most() -> None:
    twice = replace(recipe(CASES[0]), rewrites=(CASES[0], CASES[1]))
    with pytest.raises(ElastiqError, match="one rewrite can be made of a model so far; leave out all but one"):
        plan_rewrites(None, twice, IDS, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
def test_an_edit_against_dense_matrices(transposed: bool) -> None:
    """S W diag(g + offset) T⁻¹, T for each of three pieces of the columns, in double precision."""
    generator = torch.Generator().manual_seed(1)
    weight, gain = torch.randn(8, 12, generator=generator), torch.randn(12, generator=generator)
    columns, rows = (Hadamard.of(torch.rand(size, generator=generator) < 0.5) for size in (4, 8))
    edit = Edit("norm", 1.0, columns, rows, transposed)
    turn = torch.block_diag(*[columns.forward(torch.eye(4)).T] * 3).double()
    expected = rows.forward(torch.eye(8)).T.double() @ (weight * (gain + 1)).double() @ turn.T
    found = edit.apply(weight.T.contiguous() if transposed else weight, {"norm": gain}.__getitem__)
    torch.testing.assert_close((found.T if transposed else found).double(), expected, rtol=1e-5, atol=1e-5)
    bias = torch.randn(8, generator=generator)
    torch.testing.assert_close(Edit(outputs=rows).apply(bias, {}.__getitem__), rows.forward(bias))


def test_the_recipe_by_name() -> None:
    found = recipes.get("quarot-stream", levels=(3,), heads=False)
    assert found.rewrites == (ResidualRotation(heads=False),) and found.steps[0] == found.rewrites[0]
    assert Recipe.from_dict(found.to_dict()) == found
