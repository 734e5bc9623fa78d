"""Numbers of other libraries, and truth values, at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import Budget, ElastiqConfig, ElastiqError, LevelMap, recipes
from elastiq.core import plain_count, plain_number
from elastiq.evaluate import evaluate
from elastiq.foreign.exporting import HuggingFace, export
from elastiq.runtime import nested_matrices


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (4, 4),
        (np.int64(4), 4),
        (np.uint8(4), 4),
        (4.0, 4),
        (np.float64(4), 4),
        (np.float32(2.5), 2.5),
        (torch.tensor(3), 3),
        (np.array(3.5), 3.5),
        (None, None),
        ("3338", "3338"),
    ],
)
def test_a_number_becomes_pythons_own(given: Any, plain: Any) -> None:
    result = plain_number(given, "bits")
    assert result == plain and type(result) is type(plain)


@pytest.mark.parametrize("value", [True, False, np.bool_(True), torch.tensor(True)])
def test_a_truth_value_is_no_number(value: Any) -> None:
    with pytest.raises(ElastiqError, match=r"bits=(True|False) is a truth value; give a number"):
        plain_number(value, "bits")


def test_a_fraction_is_no_count() -> None:
    with pytest.raises(ElastiqError, match=r"window=2\.5 is a fraction; give a whole number"):
        plain_count(np.float32(2.5), "window")


def widths(model: torch.nn.Module) -> set[Any]:
    return {matrix.bits for matrix in nested_matrices(model).values()}


FOURS = {"int64": np.int64(4), "whole": 4.0, "float32": np.float32(4), "tensor": torch.tensor(4)}


@pytest.mark.parametrize("four", FOURS.values(), ids=FOURS.keys())
def test_every_door_takes_it(four: Any, random_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    model = elastiq.load(random_checkpoint, four, max_bits=four)
    assert widths(model) == {4} and all(type(m.bits) is int for m in nested_matrices(model).values())
    elastiq.set_bits(model, 2)
    elastiq.set_bits(model, four)
    assert widths(model) == {4}
    elastiq.set_bits(model, dict.fromkeys(nested_matrices(model), four))
    assert widths(model) == {4}
    result = evaluate(random_checkpoint, [four], text_file, window=8, num_windows=1, save=False)
    assert [row["bits"] for row in result["levels"]] == [4] and json.dumps(result)
    name = next(iter(nested_matrices(model)))
    assert LevelMap({name: four}).widths == {name: 4}
    loaded = AutoModelForCausalLM.from_pretrained(random_checkpoint, quantization_config=ElastiqConfig(bits=four))
    assert widths(loaded) == {4}
    assert export(random_checkpoint, tmp_path / "hf", HuggingFace(), four).num_bytes > 0


def test_every_door_refuses_a_truth_value(random_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    model = elastiq.load(random_checkpoint, 3)
    doors: list[Callable[[], Any]] = [
        lambda: elastiq.load(random_checkpoint, True),
        lambda: elastiq.load(random_checkpoint, 3, max_bits=True),
        lambda: elastiq.load(random_checkpoint, memory=True),
        lambda: elastiq.set_bits(model, True),
        lambda: elastiq.set_bits(model, dict.fromkeys(nested_matrices(model), True)),
        lambda: evaluate(random_checkpoint, [True], text_file),
        lambda: evaluate(random_checkpoint, [3], text_file, window=True),
        lambda: ElastiqConfig(bits=True),
        lambda: Budget(bits=True),
        lambda: export(random_checkpoint, tmp_path / "hf", HuggingFace(), True),
        lambda: recipes.nested(levels=(True, 4)),
        lambda: recipes.nested((2, 4), group_size=True),
        lambda: elastiq.plan(random_checkpoint, num_samples=True),
        lambda: elastiq.quantize(random_checkpoint, tmp_path / "out", num_samples=True),
    ]
    for door in doors:
        with pytest.raises(ElastiqError, match="True"):
            door()
    assert widths(model) == {3}


def test_transformers_takes_no_mean_width(random_checkpoint: Path) -> None:
    """It was read as the widest, without a word."""
    with pytest.raises(ElastiqError, match=r"bits=3.37 is no width and no table of widths; use elastiq.load for these"):
        AutoModelForCausalLM.from_pretrained(random_checkpoint, quantization_config=ElastiqConfig(bits=3.37))


def test_a_recipe_of_such_numbers_is_the_same_recipe() -> None:
    levels = tuple(np.array([2, 4]))
    recipe = recipes.nested(levels, np.int64(64))
    assert json.dumps(recipe.to_dict()) == json.dumps(recipes.nested((2, 4), 64).to_dict())
    damped = recipes.gptq((4,), 64)
    assert json.dumps(damped.to_dict()) == json.dumps(elastiq.Recipe.from_dict(damped.to_dict()).to_dict())
