"""What half precision does not hold: small and large weights, types that disagree, numbers that are none."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError, Recipe, recipes
from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.evaluate import doubts
from elastiq.foreign.exporting import GPTQDirectory, HuggingFace, export
from elastiq.pipeline.run import quantize

IDS = torch.randint(1, 250, (4, 32), generator=torch.Generator().manual_seed(0))
SMALL = 2.0**-22


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:2]).logits.float()


def changed(source: Path, change: Callable[[str, torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Path:
    """`source` with its arrays changed and stored as `dtype`."""
    arrays = load_file(source / "model.safetensors")
    new = {name: change(name, array.float()).to(dtype) for name, array in arrays.items()}
    save_file(new, source / "model.safetensors", {"format": "pt"})
    return source


def set_dtype(source: Path, dtype: str) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def shifted(name: str, array: torch.Tensor) -> torch.Tensor:
    """The same function: one matrix small, the next one large. Row 3 of the table of embeddings is dead."""
    if "up_proj" in name or "w3" in name:
        return array * SMALL
    if "down_proj" in name or "w2" in name:
        return array / SMALL
    if "embed_tokens" in name:
        return torch.where(torch.arange(len(array))[:, None] == 3, array * 2.0**-40, array)
    return array


def only_dead_row(name: str, array: torch.Tensor) -> torch.Tensor:
    """Row 3 of the table of embeddings is dead, nothing else."""
    return shifted(name, array) if "embed_tokens" in name else array


def pair(family: str, path: Path, recipe: Recipe) -> tuple[Path, Path]:
    """Checkpoints of a model and of the same function with small and large matrices."""
    outputs = []
    for name, change in (("plain", only_dead_row), ("moved", shifted)):
        source = changed(make_model(family, path / name, dtype=torch.float32), change, torch.float32)
        quantize(source, path / f"{name}-out", recipe, IDS)
        outputs.append(path / f"{name}-out")
    return outputs[0], outputs[1]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "nested"),
        ("llama", "nf4"),
        ("llama", "quarot"),
        ("llama", "spqr"),
        ("mixtral", "rtn"),  # where gate and up are one matrix, and tokens count otherwise then
    ],
)
def test_small_and_large_matrices_are_read_like_others(family: str, name: str, tmp_path: Path) -> None:
    recipe = recipes.get(name, embeddings=True)
    plain, moved = pair(family, tmp_path, recipe)
    for bits in recipe.levels:
        expected = logits(elastiq.load(plain, bits=bits))
        most = (0.03 if family == "mixtral" else 1e-4) * float(expected.norm())
        assert float((logits(elastiq.load(moved, bits=bits)) - expected).norm()) <= most
    theirs = AutoModelForCausalLM.from_pretrained(moved)
    assert torch.equal(logits(theirs), logits(elastiq.load(moved)))
    modules = json.loads((moved / "config.json").read_text())["quantization_config"]["modules"]
    for matrix, row in modules.items():
        kinds = [part["kind"] for part in row.get("parts", [])]
        assert ("row-powers" in kinds) == any(part in matrix for part in ("up", "down", "embed")), matrix


def test_widths_slices_gradients_and_bits(tmp_path: Path) -> None:
    plain, moved = pair("llama", tmp_path, recipes.nested((2, 4, 8), 32, embeddings=True))
    model = elastiq.load(moved, bits=2)
    elastiq.set_bits(model, 8)
    assert torch.equal(logits(model), logits(elastiq.load(moved)))
    slice_checkpoint(moved, 4, tmp_path / "four")
    assert torch.equal(logits(elastiq.load(tmp_path / "four")), logits(elastiq.load(moved, bits=4)))
    half = elastiq.load(moved, dtype=torch.bfloat16)
    assert float((logits(half) - logits(model)).norm()) < 0.05 * float(logits(model).norm())
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected = (x.double() @ layer.dense().double().T).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=float(1e-3 * expected.abs().max()))
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(3, -1), rtol=1e-4, atol=1e-9)
    dead = model.model.embed_tokens(torch.tensor([3]))
    wanted = load_file(tmp_path / "moved" / "model.safetensors")["model.embed_tokens.weight"][3]
    assert float((dead - wanted).norm() / wanted.norm()) < 0.01
    before, after = CheckpointReader(plain), CheckpointReader(moved)
    rows = sum(stored.out_features for name, stored in after.manifest.matrices.items() if name[-7:] == "up_proj")
    rows += sum(stored.out_features for name, stored in after.manifest.matrices.items() if name[-9:] == "down_proj")
    sizes = [reader.level_table["totals"]["levels"]["4"]["num_bits"] for reader in (before, after)]
    assert sizes[1] == sizes[0] + 8 * rows, "one byte a row"
    stored = [(path / "plane-1.safetensors").stat().st_size for path in (plain, moved)]
    assert 0 < stored[1] - stored[0] < rows + 1024


@pytest.mark.parametrize(
    ("name", "factor"),
    [("input_layernorm", 1e5), ("embed_tokens", 1e8), ("embed_tokens", 1e-8), ("input_layernorm", 1e-7)],
)
def test_a_bfloat16_file_under_a_float16_config(name: str, factor: float, tmp_path: Path) -> None:
    """The norm before attention, and embeddings, of a model whose answers are finite."""
    source = make_model("llama", tmp_path / "model")
    changed(source, lambda full, array: array * factor if name in full else array, torch.bfloat16)
    set_dtype(source, "float16")
    quantize(source, tmp_path / "out", recipes.rtn((8,), 32), IDS)
    specs = CheckpointReader(tmp_path / "out").base_specs
    assert {dtype for full, (dtype, _) in specs.items() if name in full} == {torch.bfloat16}
    assert specs["model.norm.weight"][0] == torch.float16, "what float16 holds stays in it"
    model = elastiq.load(tmp_path / "out")
    assert torch.isfinite(logits(model)).all()
    for full, array in load_file(source / "model.safetensors").items():
        assert name not in full or torch.equal(model.get_parameter(full), array.float())
    with pytest.raises(ElastiqError, match=f"{name}.* is none that float16 can hold; compute in bfloat16 or float32"):
        elastiq.load(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(ElastiqError, match=f"{name}.* is none that float16 can hold; compute in bfloat16 or float32"):
        quantize(source, tmp_path / "other", recipes.rtn((8,), 32), IDS, dtype=torch.float16)


def test_scales_absorbed_by_a_norm_that_half_precision_does_not_hold(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "model", dtype=torch.float32)
    norm = "post_attention_layernorm"
    changed(source, lambda full, array: array * 6e4 if norm in full else array, torch.float32)
    set_dtype(source, "float16")
    quantize(source, tmp_path / "out", recipes.awq(), IDS)
    full = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    found = logits(elastiq.load(tmp_path / "out"))
    assert torch.isfinite(found).all() and float((found - full).norm()) < 0.5 * float(full.norm())


@pytest.mark.parametrize("array", ["model.layers.0.mlp.up_proj.scale_2", "model.layers.1.mlp.gate_proj.zero_point_8"])
def test_scales_that_are_no_numbers_are_refused(array: str, tiny_model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, recipes.rtn((2, 8), 32), IDS)
    spoil(out, f"plane-{8 if array[-1] == '8' else 1}.safetensors", array)
    matrix, short = array.rsplit(".", 1)
    sentence = f"{matrix}: its {short} holds NaN or infinite numbers; copy the checkpoint again"
    for read in (elastiq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ElastiqError, match=sentence):
            read(out)
    with pytest.raises(ElastiqError, match=sentence):
        export(out, tmp_path / "hf", HuggingFace(), int(array[-1]))


@pytest.mark.parametrize(
    ("recipe", "ending"),
    [
        (recipes.mx("e2m1"), "scale_4"),
        (recipes.nv(), "scale_4"),
        (recipes.nf4(), "scale_4_top"),
        (recipes.awq(), "side_0_scale"),
    ],
    ids=["mx", "nv", "nf4", "fold"],
)
def test_other_scales_that_are_no_numbers_are_refused(
    recipe: Recipe, ending: str, tiny_model: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(tiny_model("llama"), out, recipe, IDS)
    found = sorted(name for name in load_file(out / "plane-1.safetensors") if name.endswith(f".{ending}"))
    spoil(out, "plane-1.safetensors", found[0])
    with pytest.raises(ElastiqError, match=rf"{found[0].rsplit('.', 1)[0]}: .*(not finite|NaN or infinite)"):
        logits(elastiq.load(out))


def spoil(out: Path, file: str, array: str) -> None:
    """Put what is no number into an array, and the right checksum."""
    header, start = json.loads((out / file).read_bytes()[8:].split(b"}}")[0] + b"}}"), 0
    start = 8 + int.from_bytes((out / file).read_bytes()[:8], "little") + header[array]["data_offsets"][0]
    data = bytearray((out / file).read_bytes())
    size = {"F16": 2, "F32": 4, "U8": 1}[header[array]["dtype"]]
    data[start : start + size] = b"\xff" * size  # NaN in every one of them
    (out / file).write_bytes(data)
    sums = json.loads((out / "checksums.json").read_text())
    sums["files"][file]["sha256"] = hashlib.sha256(data).hexdigest()
    (out / "checksums.json").write_text(json.dumps(sums))


def test_exports_hold_the_powers_or_name_the_matrix(tmp_path: Path) -> None:
    _, moved = pair("llama", tmp_path, recipes.rtn((4, 8), 32))
    export(moved, tmp_path / "hf", HuggingFace(), 8)
    expected = logits(elastiq.load(moved))
    held = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32))
    assert float((held - expected).norm()) < 0.02 * float(expected.norm())
    refused = r"gptq: model.layers.\d.mlp.(up|down)_proj has rows too small or too large for half-precision scales"
    with pytest.raises(ElastiqError, match=refused):
        export(moved, tmp_path / "gptq", GPTQDirectory(), 4)
    assert not (tmp_path / "gptq").exists()


def test_one_dead_row_does_not_hinder_an_export(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "model", dtype=torch.float32)

    def dead(name: str, array: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(len(array))[:, None] == 3, array * 1e-7, array) if "up_proj" in name else array

    changed(source, dead, torch.float32)
    quantize(source, tmp_path / "out", recipes.rtn((4, 8), 32), IDS)
    assert all(s.parts for n, s in CheckpointReader(tmp_path / "out").manifest.matrices.items() if "up_proj" in n)
    exported = export(tmp_path / "out", tmp_path / "gptq", GPTQDirectory(), 4)
    assert exported


def test_what_is_no_better_than_zeros_is_said_once(
    tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {
            "name": f"m.{i}",
            "dropped": 7 * (i == 2),
            "levels": {"2": {"error": 1.0 + i}, "4": {"error": 0.1 + i / 6}, "8": {"error": None}},
        }
        for i in range(6)
    ]
    useless, dropped = doubts(rows)
    assert useless == (
        "m.0 up to 2 bits (1), m.1 up to 2 bits (2), m.2 up to 2 bits (3), m.3 up to 2 bits (4) and 2 more: no better "
        "than zeros there (relative output error); read wider levels, or choose another recipe or smaller groups"
    )
    assert dropped == (
        "m.2 (7): so many tokens of the calibration gave numbers that are not finite and were left out; compute in "
        "float32 or bfloat16"
    )
    assert not list(doubts([{"name": "a", "levels": {"4": {"error": 0.9}}}]))
    with caplog.at_level(logging.WARNING, "elastiq"):
        quantize(tiny_model("llama"), tmp_path / "out", recipes.nested((4, 8), 32), IDS)
    assert "no better than zeros" not in caplog.text
