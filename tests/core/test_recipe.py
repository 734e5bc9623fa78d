"""Recipes as data."""

from __future__ import annotations

import json

import pytest

from elastiq import ElastiqError, Recipe, recipes


@pytest.mark.parametrize("name", recipes.names())
def test_round_trip_through_json(name: str) -> None:
    recipe = recipes.get(name, levels=(2, 5), group_size=128, symmetric=True, embeddings=True, inputs="quantized")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"solver": {"name": "magic"}}, "solver: unknown name 'magic'; known: gptq, nested, rtn"),
        ({"solver": {"name": "gptq", "percdamp": 1}}, "solver gptq: unknown parameter percdamp; known: act_order"),
        ({"format": {}}, "format: unknown name None; known: integer"),
        ({"tuner": {"name": "luck"}}, "tuner: unknown name 'luck'; known: scales"),
        ({"splits": []}, "recipe: unknown slot splits"),
        ({"inputs": "random"}, "recipe: inputs='random' is not one of full, quantized"),
        ({"token_weights": "some"}, "recipe: token_weights='some' is not one of output, uniform"),
    ],
)
def test_bad_data_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence.replace("[", r"\[")):
        Recipe.from_dict(recipes.nested().to_dict() | change)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ElastiqError, match="recipe 'best' does not exist; known: nested, nested-tuned, gptq, rtn"):
        recipes.get("best")
