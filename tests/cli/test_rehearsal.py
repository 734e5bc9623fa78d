"""Rehearsals: everything is tried, nothing is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from elastiq import recipes
from elastiq.cli import app
from elastiq.cli.rehearsal import rehearse
from elastiq.foreign.exporting import GPTQDirectory, HuggingFace

QUICK = ["--levels", "4,6,8", "--group-size", "32"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_step_in_a_table(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    model, file = tiny_model("llama"), tmp_path / "rehearsal.json"
    result = run("quantize", model, "-o", tmp_path / "out", *QUICK, "--rehearse", "--to", "gguf", "--json", file)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == ["quantize", "load", *(f"gguf, {b} bits" for b in (4, 6, 8))]
    assert all(row["passed"] for row in rows)
    assert "8.50 bits per weight as Q8_0, logits differ by" in rows[-1]["detail"]
    assert "a real run will go through; nothing was kept" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal.json"]


def test_a_target_passes_with_one_of_its_widths(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = recipes.nested(levels=(6, 8), group_size=32)
    found = rehearse(tiny_model("llama"), tmp_path / "out", recipe, [GPTQDirectory()])
    assert found.passed and [row.passed for row in found.rows] == [True, True, False, True]
    assert "is read at 6 bits, the format has 2, 3, 4, 8" in found.rows[2].detail
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_hold_the_model_fails(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["--rehearse", "--to", "gptq", "--to", "hf"]
    result = run("quantize", tiny_model("gpt2"), "-o", tmp_path / "out", *QUICK, *arguments)
    assert result.exit_code == 1
    assert "is no ordinary linear layer; export to hf or gguf" in result.stdout
    assert "a real run would fail" in result.stdout
    assert not list(tmp_path.iterdir())


def test_what_fails_early_is_said_and_removed(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rehearse("absent/x/y", tmp_path / "out", recipes.rtn(), [HuggingFace()])
    assert not found.passed and [row.what for row in found.rows] == ["quantize"]
    assert "absent/x/y does not exist" in found.rows[0].detail

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("elastiq.cli.rehearsal.export", killed)
    with pytest.raises(KeyboardInterrupt):
        rehearse(tiny_model("llama"), tmp_path / "out", recipes.rtn(group_size=32), [HuggingFace()])
    assert not list(tmp_path.iterdir())


def test_a_target_without_a_rehearsal_is_refused(tmp_path: Path) -> None:
    assert "--rehearse" in run("quantize", "a", "-o", tmp_path / "out", "--to", "gguf").stderr
