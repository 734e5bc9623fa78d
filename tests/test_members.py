"""Rows and experts at widths of their own: loaded, switched, counted, refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError
from elastiq.allocate import complete, read_map, write_map
from elastiq.checkpoint import CheckpointReader
from elastiq.checkpoint.sizes import held_bytes, map_sizes
from elastiq.core import LevelMap, Width
from elastiq.evaluate import evaluate
from elastiq.foreign.exporting import export
from elastiq.integrations.transformers import ElastiqConfig
from elastiq.runtime import StoredMatrix, bits_per_weight, nested_matrices
from elastiq.runtime.mixed import MixedLinear
from elastiq.runtime.stored import StoredPart

IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("members") / family
            source = tiny_model(family)
            write_random(AutoModelForCausalLM.from_pretrained(source), source, made[family])
        return made[family]

    return get


def mixed(path: Path, seed: int = 0) -> dict[str, Width]:
    """A digit for every row or expert of most matrices, one width for the others."""
    generator = random.Random(seed)
    widths: dict[str, Width] = {}
    for index, (name, matrix) in enumerate(CheckpointReader(path).manifest.matrices.items()):
        digits = "".join(generator.choice("23578") for _ in range(matrix.members))
        widths[name] = 4 if index % 4 == 3 else digits
    return widths


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_every_member_is_that_of_its_width(checkpoint: Callable[[str], Path], family: str) -> None:
    path = checkpoint(family)
    widths = mixed(path)
    model = elastiq.load(path, bits=widths)
    found = nested_matrices(model)
    assert {name: matrix.bits for name, matrix in found.items()} == widths
    uniform = {bits: nested_matrices(elastiq.load(path, bits=bits)) for bits in (2, 3, 4, 5, 7, 8)}
    for name, matrix in found.items():
        digits = widths[name]
        expected = torch.stack(
            [
                uniform[int(digits[i]) if isinstance(digits, str) else digits][name].dense()[i]
                for i in range(matrix.stored.members)
            ]
        )
        assert torch.equal(matrix.dense(), expected)
        if matrix.stored.role == "expert":
            assert torch.equal(matrix[2], expected[2])
    assert bits_per_weight(model) == pytest.approx(map_sizes(CheckpointReader(path), widths)["bits_per_weight"])
    for name, matrix in found.items():
        assert sum(buffer.nbytes for buffer in matrix.buffers()) == held_bytes(matrix.stored, widths[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_model_computes_with_these_values(checkpoint: Callable[[str], Path], family: str) -> None:
    """Against the same model with dense weights in the place of its matrices."""
    path = checkpoint(family)
    model: Any = elastiq.load(path, bits=mixed(path))
    full: Any = AutoModelForCausalLM.from_config(model.config).eval()
    full.set_experts_implementation("eager")
    state = {name: value for name, value in model.state_dict().items() if name in full.state_dict()}
    for name, matrix in nested_matrices(model).items():
        weight = matrix.dense()
        key = name if matrix.stored.role == "expert" else f"{name}.weight"
        state[key] = weight.T if matrix.stored.role == "conv1d" else weight
    full.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, full(IDS).logits, rtol=1e-3, atol=1e-3)
        several = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
        assert torch.equal(several, full.generate(IDS[:, :5], max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_switched_and_back(checkpoint: Callable[[str], Path], family: str, tmp_path: Path) -> None:
    path = checkpoint(family)
    model, before = elastiq.load(path, bits=8), elastiq.load(path, bits=8)
    for seed in (0, 1):
        file = tmp_path / f"{seed}.json"
        write_map(file, LevelMap(mixed(path, seed)))
        assert dict(read_map(file).widths) == mixed(path, seed)
        elastiq.set_bits(model, file)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, elastiq.load(path, bits=file)(IDS).logits)
    name = next(name for name, width in mixed(path, 1).items() if isinstance(width, str))
    elastiq.set_bits(model, {name: 3})
    assert nested_matrices(model)[name].bits == 3
    elastiq.set_bits(model, 8)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before(IDS).logits)


def test_evaluated_beside_uniform_widths(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("llama")
    (tmp_path / "text.txt").write_text("a quick brown fox " * 40)
    widths = mixed(path)
    result = evaluate(path, [3, LevelMap(widths)], tmp_path / "text.txt", window=16, num_windows=2, save=False)
    sizes = map_sizes(CheckpointReader(path), complete(CheckpointReader(path), widths))
    (row,) = [row for row in result["levels"] if row["bits"] != 3]
    assert row["bits_per_weight"] == sizes["bits_per_weight"] and row["perplexity"] > 0
    again = evaluate(path, [LevelMap(widths)], tmp_path / "text.txt", window=16, num_windows=2, save=False)
    assert again["levels"][0]["perplexity"] == row["perplexity"]


@pytest.mark.parametrize(
    ("width", "sentence"),
    [
        ("22", r"2 widths were given for linear \[\d+, \d+\]; give one for the whole, or one digit for each of its"),
        ("", "has the width '', which is none from 1 to 8"),
        ("2" * 31 + "9", "has the width '2222222222222222222222222222222"),
        ("zwei", "has the width 'zwei', which is none"),
    ],
)
def test_digits_that_do_not_fit_are_refused(checkpoint: Callable[[str], Path], width: str, sentence: str) -> None:
    path = checkpoint("llama")
    with pytest.raises(ElastiqError, match=sentence):
        elastiq.load(path, bits=LevelMap({"model.layers.0.self_attn.q_proj": width}))


def test_embeddings_have_one_width(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    write_random(AutoModelForCausalLM.from_pretrained(source), source, tmp_path / "out", embeddings=True)
    reader = CheckpointReader(tmp_path / "out")
    (name,) = [name for name, matrix in reader.manifest.matrices.items() if matrix.role == "embedding"]
    digits = "3" * reader.manifest.matrices[name].shape[0]
    with pytest.raises(ElastiqError, match=r"widths were given for embedding \[\d+, \d+\]; give one for the whole$"):
        elastiq.load(tmp_path / "out", bits={name: digits})


def test_matrices_of_more_than_codes_have_one_width() -> None:
    part = StoredPart("low-rank", "u.", {}, {})
    assert StoredMatrix("m", "linear", (96, 64), 32, (2, 3, 8), parts=(part,)).members == 1


def test_what_cannot_hold_them_says_so(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("llama")
    widths = mixed(path)
    with pytest.raises(ElastiqError, match=r"which no other format takes; export a map with a width for each matrix"):
        export(path, tmp_path / "out", "hf", widths)
    with pytest.raises(ElastiqError, match=r"are not loaded by transformers; use elastiq.load"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=ElastiqConfig(bits=widths))
    model = elastiq.load(path, bits=widths)
    with pytest.raises(ElastiqError, match=r"hold planes of several widths; use elastiq.set_bits with one width"):
        next(m for m in model.modules() if isinstance(m, MixedLinear)).arrays()
    matrix = next(m for m in nested_matrices(model).values() if isinstance(m, MixedLinear))
    with pytest.raises(ElastiqError, match=r"held at widths of their own; use elastiq.set_bits"):
        matrix.bits = 3
