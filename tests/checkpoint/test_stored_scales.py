"""Checkpoints whose scales are stored in fewer bits: read, saved, cut, exported, trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqConfig, load, quantize, recipes, set_bits
from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.checkpoint.sizes import level_sizes
from elastiq.foreign.exporting import GPTQDirectory, HuggingFace, export
from elastiq.runtime import bits_per_weight, nested_matrices
from elastiq.tuners import ScaleTuning

IDS = torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(0))
RECIPE = recipes.rtn((2, 3, 4), 16, scales="int6")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS[:2]).logits
    return found


@pytest.mark.parametrize("scales", ["int6", "e4m3-row"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_what_is_read_is_what_was_made(
    family: str, scales: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipes.rtn((2, 3, 4), 16, scales=scales)
    quantize(tiny_model(family), tmp_path / "half", recipes.rtn((2, 3, 4), 16), IDS)
    summary = quantize(tiny_model(family), tmp_path / "out", recipe, IDS)
    reader, model, half = CheckpointReader(tmp_path / "out"), load(tmp_path / "out"), load(tmp_path / "half")
    for level in recipe.levels:
        for each in (model, half):
            set_bits(each, level)
        names = nested_matrices(half)
        for name, matrix in nested_matrices(model).items():
            assert (matrix.dense() - names[name].dense()).norm() < 0.3 * names[name].dense().norm()
        assert bits_per_weight(model) < bits_per_weight(half)
        assert bits_per_weight(model) == pytest.approx(summary.levels[level]["bits_per_weight"])
        counted = sum(row["levels"][str(level)]["num_bits"] for row in reader.table)
        weights = sum(matrix.stored.num_weights for matrix in nested_matrices(model).values())
        assert counted / weights == pytest.approx(bits_per_weight(model), rel=1e-9)
    written = 0
    for plane in range(1, 5):
        with safe_open(tmp_path / f"out/plane-{plane}.safetensors", framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        written += sum(a.nbytes for name, a in arrays.items() if "scale_4" in name or "zero_point_4" in name)
        assert not any(name.endswith(("scale_4", "zero_point_4")) for name in arrays)
    groups = sum(m.stored.num_bits(4) - 4 * m.stored.num_weights for m in nested_matrices(model).values())
    assert 8 * written == groups, "nothing else is stored of a level"


def test_memory_is_counted(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    summary = quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS)
    planned = elastiq.plan(tiny_model("llama"), RECIPE)
    model = load(tmp_path / "out")
    held = sum({b.data_ptr(): b.nbytes for b in [*model.buffers(), *model.parameters()] if b.numel()}.values())
    counted = level_sizes(CheckpointReader(tmp_path / "out"), [4])[4]["bytes_in_memory"]
    assert counted <= held <= counted + 4096 and summary.levels[4]["bytes_in_memory"] == counted
    assert planned.levels[4]["bytes_in_memory"] == pytest.approx(counted, rel=0.05)


def test_everywhere_a_checkpoint_goes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS)
    expected = {bits: logits(load(tmp_path / "out", bits)) for bits in (1, 2, 3, 4)}
    config = ElastiqConfig(bits=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config, dtype=torch.float32)
    assert torch.equal(logits(model), expected[3])
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(saved), expected[3])
    slice_checkpoint(tmp_path / "out", 2, tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small", 2)), expected[2])
    half = load(tmp_path / "out", 4).to(torch.bfloat16).to(torch.float32)
    assert {b.dtype for n, b in half.named_buffers() if n.endswith("scale_4")} == {torch.float16}
    export(tmp_path / "out", tmp_path / "hf", HuggingFace(), bits=4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected[4], rtol=0, atol=2e-2)
    rows = {name: "2" * 10 + "4" * (m.stored.shape[0] - 10) for name, m in nested_matrices(model).items()}
    mixed = load(tmp_path / "out", bits=rows)
    for name, matrix in nested_matrices(mixed).items():
        low, high = (nested_matrices(load(tmp_path / "out", bits))[name].dense() for bits in (2, 4))
        assert torch.equal(matrix.dense(), torch.cat([low[:10], high[10:]]))


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_read_follows_a_state_that_is_loaded(
    assign: bool, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, recipe in (("out", RECIPE), ("other", recipes.gptq((2, 3, 4), 16, scales="int6"))):
        quantize(tiny_model("llama"), tmp_path / name, recipe, IDS)
    model, other = load(tmp_path / "out", 4), load(tmp_path / "other", 4)
    assert not torch.equal(logits(model), logits(other))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(logits(model), logits(other))


def test_an_integer_export_reads_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", recipes.rtn((2, 4), 32, scales="e4m3-row"), IDS)
    done = export(tmp_path / "out", tmp_path / "gptq", GPTQDirectory(), 4)
    assert done.error < 0.02


def test_tuned_scales_are_stored_so_too(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = replace(RECIPE, tuner=ScaleTuning(steps=8, batch=2, rate=2e-2, holdout=3))
    quantize(tiny_model("llama"), tmp_path / "before", RECIPE, IDS)
    quantize(tiny_model("llama"), tmp_path / "after", recipe, IDS, tuning=IDS, dtype=torch.float32)
    full = logits(AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32))
    before, after = (float((logits(load(tmp_path / n, 2)) - full).square().mean()) for n in ("before", "after"))
    assert after < before
