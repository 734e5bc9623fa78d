"""The model card says what the files say, and leaves its owner's words alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import elastiq
from elastiq import ElastiqError
from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.checkpoint.files import sha256
from elastiq.cli import app
from elastiq.evaluate import evaluate, row_name, write_card
from elastiq.transforms import RandomHadamard

RECIPE = elastiq.recipes.rtn(levels=(2, 4), group_size=32)


@pytest.fixture
def made(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    elastiq.quantize(tiny_model("llama"), tmp_path / "nested", RECIPE, num_samples=2, seq_len=32)
    return tmp_path / "nested"


def cells(card: str, bits: str) -> list[str]:
    line = next(line for line in card.splitlines() if line.startswith(f"| {bits} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_finished_checkpoint_has_one(made: Path, tmp_path: Path) -> None:
    card = ModelCard.load(made / "README.md")
    assert card.data.tags == ["elastiq", "quantized", "rtn", "2-bit", "4-bit"] and card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation"
    assert "elastiq quantize llama -o nested --recipe rtn --levels 2,4 --group-size 32" in card.text
    assert cells(card.text, "4")[:2] == ["4", "5.00"] and "perplexity" not in card.text
    CheckpointReader(made)  # its checksums do not mind
    result = CliRunner().invoke(app, ["slice", str(made), "--bits", "3", "-o", str(tmp_path / "small")])
    assert result.exit_code == 0 and "read at 1,2,3 bits" in (tmp_path / "small/README.md").read_text()


def test_a_recipe_without_a_name_is_told_by_its_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = replace(RECIPE, transforms=(RandomHadamard(seed=1),))
    elastiq.quantize(tiny_model("llama"), tmp_path / "nested", recipe, num_samples=2, seq_len=32)
    card = ModelCard.load(tmp_path / "nested" / "README.md").text
    assert "--recipe nested/recipe.json --num-samples" in card and "transform `hadamard`" in card
    assert elastiq.recipes.read(tmp_path / "nested" / "recipe.json") == recipe


def test_evaluating_brings_it_up_to_date(made: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 40)
    found = evaluate(made, [2, 3.37, 4], text, against=tiny_model("llama"), window=32, num_windows=2)
    card = (made / "README.md").read_text()
    for row in found["levels"]:
        assert cells(card, row_name(row))[4:] == [f"{row['perplexity']:.2f}", f"{row['kl_mean']:.3g}"]
    assert cells(card, "16")[4] == f"{found['full']['perplexity']:.2f}"
    assert "2 non-overlapping windows of 32 tokens" in card
    other = tmp_path / "other.txt"
    other.write_text("a second text, it is\n" * 40)
    evaluate(made, [2], other, window=32, num_windows=1)
    card = (made / "README.md").read_text()
    assert "perplexity (1)" in card and "perplexity (2)" in card and cells(card, "4")[6:] == ["", ""]
    small = tmp_path / "small"
    slice_checkpoint(made, 2, small)
    (small / "README.md").unlink(missing_ok=True)
    shutil.copy(made / "evaluation.json", small)  # as a pull of two planes brings it
    card = write_card(small).read_text()
    assert cells(card, "2")[4] == f"{found['levels'][0]['perplexity']:.2f}"
    assert not any(line.startswith(("| 3.37 |", "| 4 |")) for line in card.splitlines())


def test_the_owners_words_stay(made: Path) -> None:
    path = made / "README.md"
    card = path.read_text()
    own = card.replace("---\n\n", "license: mit\n---\n\nMine before.\n\n", 1) + "\nMine after.\n"
    path.write_text(own.replace("group size 32", "group size wrong"))
    write_card(made)
    assert path.read_text() == own
    path.write_text("All mine.")
    write_card(made)
    assert path.read_text() == "All mine."


def test_a_hub_name_is_the_base_model(made: Path) -> None:
    levels = json.loads((made / "levels.json").read_text())
    levels["info"]["base_model"] = "somebody/model"
    (made / "levels.json").write_text(json.dumps(levels))
    checksums = json.loads((made / "checksums.json").read_text())
    checksums["files"]["levels.json"]["sha256"] = sha256(made / "levels.json")
    (made / "checksums.json").write_text(json.dumps(checksums))
    (made / "README.md").unlink()
    card = ModelCard.load(write_card(made))
    assert (card.data.base_model, card.data.base_model_relation) == ("somebody/model", "quantized")
    assert "elastiq quantize somebody/model" in card.text


def test_evaluations_that_are_not_ours(made: Path) -> None:
    broken = {"levels": [{"bits": "x"}], "protocol": {"text": "t"}, "against": None}
    (made / "evaluation.json").write_text(json.dumps({"evaluations": [broken]}))
    with pytest.raises(ElastiqError, match="not what elastiq writes; remove it"):
        write_card(made)
