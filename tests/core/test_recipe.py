"""Recipes as data."""

from __future__ import annotations

import json

import pytest

from elastiq import ElastiqError, Recipe, recipes


@pytest.mark.parametrize("name", recipes.names())
def test_round_trip_through_json(name: str) -> None:
    recipe = recipes.get(name, embeddings=True, inputs="quantized")
    assert recipe.embeddings and recipe.inputs == "quantized"
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"solver": {"name": "magic"}}, "solver: unknown name 'magic'; known: bitstack, decoupleq, gptq, nested, rtn"),
        ({"solver": {"name": "gptq", "percdamp": 1}}, "solver gptq: unknown parameter percdamp; known: act_order"),
        ({"format": {}}, "format: unknown name None; known: block-scaled, codebook, integer"),
        ({"tuner": {"name": "luck"}}, "tuner: unknown name 'luck'; known: co-distillation, gumbel, scales, sign-round"),
        ({"splits": [{"name": "magic"}]}, "split: unknown name 'magic'; known: llm-int8, pb-llm, spqr"),
        ({"rotations": []}, "recipe: unknown slot rotations"),
        (
            {"tuner": {"name": "scales"}, "transforms": [{"name": "hadamard"}]},
            "a tuner works on nested integer codes alone; leave out its transforms",
        ),
        ({"inputs": "random"}, "recipe: inputs='random' is not one of full, quantized"),
        ({"token_weights": "some"}, "recipe: token_weights='some' is not one of output, uniform"),
    ],
)
def test_bad_data_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence.replace("[", r"\[")):
        Recipe.from_dict(recipes.nested().to_dict() | change)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ElastiqError, match="recipe 'best' does not exist; known: nested, nested-tuned, "):
        recipes.get("best")


def test_options_that_several_recipes_take() -> None:
    for name in ("nested", "nested-tuned", "gptq", "rtn", "awq", "quarot", "spqr", "lorc", "bias", "decoupleq"):
        recipe = recipes.get(name, levels=(2, 5), group_size=128, symmetric=True)
        assert recipe.levels == (2, 5) and recipe.format.to_dict()["group_size"] == 128


def test_an_option_that_a_recipe_has_not_is_refused() -> None:
    with pytest.raises(ElastiqError, match="recipe mx: it has no levels, symmetric; known: number, embeddings, inputs"):
        recipes.get("mx", levels=(2,), symmetric=True)
