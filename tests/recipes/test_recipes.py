"""Every recipe from a model to a checkpoint and back, at every level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastiq import load, quantize, recipes, set_bits
from elastiq.checkpoint import CheckpointReader
from elastiq.core import ElastiqError, Recipe
from elastiq.foreign.exporting import GPTQDirectory, HuggingFace, export
from elastiq.formats import Integer
from elastiq.runtime import bits_per_weight
from elastiq.runtime.swap import nested_matrices
from elastiq.solvers import RoundToNearest
from elastiq.splits import SensitiveWeights
from elastiq.transforms import RandomHadamard, SmoothQuant

IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(0))
NAMES = [name for name in recipes.names() if name != "nested-tuned"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS[:2]).logits
    return found


def check(source: Path, output: Path, recipe: Recipe) -> None:
    summary = quantize(source, output, recipe, IDS)
    model = load(output)
    errors = []
    for level in recipe.levels:
        set_bits(model, level)
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        full = logits(plain)
        for name, parameter in model.named_parameters():  # a transform may have changed norms and biases
            plain.get_parameter(name).data.copy_(parameter)
        for name, matrix in nested_matrices(model).items():
            role, dense = matrix.stored.role, matrix.dense()
            terms = [] if role == "expert" else matrix.restored()[2]
            weight = plain.get_parameter(name if role == "expert" else f"{name}.weight")
            weight.data.copy_(dense.T if role == "conv1d" else dense)
            shifts = [shift for term in terms if (shift := term.shift(level)) is not None]
            if shifts:
                plain.get_submodule(name).bias = torch.nn.Parameter(torch.stack(shifts).sum(0))
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=2e-3)
        errors.append(float((logits(model) - full).square().mean()))
        assert bits_per_weight(model) == pytest.approx(summary.levels[level]["bits_per_weight"])
        counted = sum(row["levels"][str(level)]["num_bits"] for row in CheckpointReader(output).table)
        weights = sum(matrix.stored.num_weights for matrix in nested_matrices(model).values())
        assert counted / weights == pytest.approx(bits_per_weight(model), rel=1e-9), "counted from what is written"
    assert recipe.levels[-1] < 3 or errors[-1] < 0.5 * float(full.square().mean())
    assert errors[-1] <= errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_a_checkpoint(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A loaded model computes with what its matrices decode to, and takes the bits that were counted."""
    check(tiny_model("llama"), tmp_path / "out", recipes.get(name))


COMPOSED = Recipe(
    Integer((2, 4), 32),
    RoundToNearest(),
    transforms=(SmoothQuant(), RandomHadamard()),
    splits=(SensitiveWeights(0.02),),
)


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen2"])
def test_other_families(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts of a fused tensor, transposed matrices, and matrices with a bias of their own."""
    check(tiny_model(family), tmp_path / "out", COMPOSED)


def test_a_composed_matrix_is_exported_dense_or_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", COMPOSED, IDS)
    model = load(tmp_path / "out", bits=4)
    export(tmp_path / "out", tmp_path / "hf", HuggingFace(), bits=4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=2e-2)
    with pytest.raises(ElastiqError, match=r"consists of more than integer codes \(.*\); export to hf"):
        export(tmp_path / "out", tmp_path / "gptq", GPTQDirectory(), bits=4)
