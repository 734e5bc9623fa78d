"""Recipes as data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastiq import ElastiqError, Recipe, recipes
from elastiq.core import Step, TokenWeights
from elastiq.solvers import GPTQ, BitStack, DecoupleQ, Nested
from elastiq.splits import OutlierFeatures
from elastiq.token_weights import AttentionConcentration, BlockOutput, Uniform
from elastiq.transforms import ActivationAware, RandomHadamard
from elastiq.tuners import ScaleTuning


@pytest.mark.parametrize("name", recipes.names())
def test_round_trip_through_json(name: str) -> None:
    recipe = recipes.get(name, embeddings=True, inputs="quantized")
    assert recipe.embeddings and recipe.inputs == "quantized"
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"solver": {"name": "magic"}},
            "solver: unknown name 'magic'; known: bitstack, decoupleq, gptq, hqq, nested, rtn",
        ),
        ({"solver": {"name": "gptq", "percdamp": 1}}, "solver gptq: unknown parameter percdamp; known: act_order"),
        ({"format": {}}, "format: unknown name None; known: block-scaled, codebook, integer"),
        ({"tuner": {"name": "luck"}}, "tuner: unknown name 'luck'; known: co-distillation, gumbel, scales, sign-round"),
        ({"splits": [{"name": "magic"}]}, "split: unknown name 'magic'; known: llm-int8, pb-llm, spqr"),
        ({"rotations": []}, "recipe: unknown slot rotations"),
        (
            {"tuner": {"name": "scales"}, "compensators": [{"name": "bias"}]},
            "a tuner sees no shift of an output; leave out the compensator bias",
        ),
        ({"inputs": "random"}, "recipe: inputs='random' is not one of full, quantized"),
        (
            {"token_weights": "some"},
            "token-weights: unknown name 'some'; known: attention-concentration, block-output, uniform",
        ),
        (
            {"token_weights": {"name": "attention-concentration", "least": 0.0}},
            "attention-concentration: least=0.0 must be above 0 and at most 1",
        ),
    ],
)
def test_bad_data_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence.replace("[", r"\[")):
        Recipe.from_dict(recipes.nested().to_dict() | change)


@pytest.mark.parametrize(("word", "member"), [("output", BlockOutput()), ("uniform", Uniform())])
def test_token_weights_of_earlier_recipes_are_read(word: str, member: TokenWeights) -> None:
    """Checkpoints say "output" where the step is called block-output now."""
    assert Recipe.from_dict(recipes.nested().to_dict() | {"token_weights": word}).token_weights == member


def test_token_weights_are_steps() -> None:
    assert Recipe.from_dict(recipes.rtn(token_weights=None).to_dict()).token_weights is None
    assert recipes.awq(token_weights=AttentionConcentration(0.1)).steps[0] == AttentionConcentration(0.1)
    with pytest.raises(ElastiqError, match=r"token_weights='uniform' are no token weights; .* such as Uniform\(\)"):
        recipes.nested(token_weights="uniform")  # type: ignore[arg-type]


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ElastiqError, match="recipe 'best' does not exist; known: nested, nested-tuned, "):
        recipes.get("best")


def test_options_that_several_recipes_take() -> None:
    for name in ("nested", "nested-tuned", "gptq", "rtn", "awq", "quarot", "spqr", "lorc", "bias", "decoupleq"):
        recipe = recipes.get(name, levels=(2, 5), group_size=128, symmetric=True)
        assert recipe.levels == (2, 5) and recipe.format.to_dict()["group_size"] == 128


def test_an_option_that_a_recipe_has_not_is_refused() -> None:
    with pytest.raises(ElastiqError, match="recipe mx: it has no levels, symmetric; known: number, round_up"):
        recipes.get("mx", levels=(2,), symmetric=True)
    with pytest.raises(ElastiqError, match="unexpected keyword argument 'symmetrical'"):
        recipes.get("gptq", symmetrical=True)


@pytest.mark.parametrize(
    ("step", "parameters", "sentence"),
    [
        (GPTQ, {"block_size": 0}, "gptq: block_size=0 must be at least 1"),
        (GPTQ, {"damp": float("nan")}, "gptq: damp=nan must be at least 0"),
        (GPTQ, {"refits": -1}, "gptq: refits=-1 must be at least 0"),
        (Nested, {"beam": 0}, "nested: beam=0 must be at least 1"),
        (DecoupleQ, {"rounds": 0}, "decoupleq: rounds=0 must be at least 1"),
        (BitStack, {"rank": 0}, "bitstack: rank=0 must be at least 1"),
        (ActivationAware, {"steps": 0}, "awq: steps=0 must be at least 1"),
        (OutlierFeatures, {"threshold": float("nan")}, "llm-int8: threshold=nan must be at least 0"),
        (ScaleTuning, {"rate": float("nan")}, "scales: steps, batch, holdout, rate, .* must be positive"),
    ],
)
def test_a_parameter_that_cannot_be_is_refused(step: type[Step], parameters: dict[str, float], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        step(**parameters)


@pytest.mark.parametrize("name", recipes.names())
def test_the_words_that_make_a_recipe(name: str) -> None:
    known = recipes.words(recipes.get(name))
    assert known is not None and known[0] == name
    if name != "any-precision":
        assert recipes.words(recipes.get(name, embeddings=True)) == [*known, "--embeddings"]
    if RandomHadamard() in recipes.get(name).transforms:
        with pytest.raises(ElastiqError, match="rotates already"):
            recipes.get(name, rotate=True)
    else:
        rotated = ["quarot", *known[1:]] if name == "gptq" else [*known, "--rotate"]
        assert recipes.words(recipes.get(name, rotate=True)) == rotated


def test_a_recipe_of_nobody_has_no_words() -> None:
    assert recipes.words(replace(recipes.nested(), transforms=(RandomHadamard(seed=1),))) is None
    some = recipes.get("gptq", levels=(3,), group_size=128, symmetric=True, inputs="quantized")
    expected = "gptq --levels 3 --group-size 128 --symmetric --inputs quantized"
    assert recipes.words(some) == expected.split()
    small = recipes.get("nested", levels=(2, 3), scales="int6")
    assert recipes.words(small) == ["nested", "--levels", "2,3", "--group-size", "64", "--scales", "int6"]


def test_a_recipe_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(recipes.nested_tuned().to_dict() | {"transforms": [{"name": "hadamard"}]}))
    read = recipes.read(path)
    assert read.tuner == recipes.nested_tuned().tuner and read.transforms == (RandomHadamard(),)


def test_a_tuned_recipe_weighs_wide_levels_more() -> None:
    assert recipes.nested_tuned((2, 4)).solver == Nested(weights=(1.0, 5.0))
    assert recipes.nested_tuned((2, 4), weights=(3.0, 2.0), passes=1).solver == Nested(weights=(3.0, 2.0), passes=1)
    with pytest.raises(ElastiqError, match="must lie between 1 and 8"):
        recipes.nested_tuned((2, 9))


def made(**slots: Any) -> str:
    """A recipe file whose slots are these."""
    return json.dumps(recipes.nested((2, 4)).to_dict() | slots)


def test_whole_numbers_stand_for_fractions(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(made(solver={"name": "nested", "weights": [1, 16]}))
    read = recipes.read(path)
    assert read == recipes.nested((2, 4), weights=(1.0, 16.0))
    assert isinstance(read.solver, Nested) and isinstance(read.solver.weights[1], float)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"mine.json: no recipe \(.*`elastiq recipes nested` prints one"),
        ("[1]", r"mine.json: no recipe \(not an object\)"),
        ('{"format": {"name": "integer"}, "solver": {"name": "nested", "damp": NaN}}', r"\(NaN is not finite\)"),
        ('{"format": {"name": "integer"}, "solver": {"name": "nested", "damp": -1e999}}', r"\(-1e999 is not finite\)"),
        ('{"format": 3}', "mine.json: no recipe"),
        ('{"format": {"name": "integer", "levels": "x"}, "solver": {"name": "rtn"}}', "mine.json: "),
        ('{"format": {"name": "magic"}}', "mine.json: format: unknown name 'magic'"),
        ('{"format": {"name": "integer"}, "solver": {"name": "rtn"}, "splits": 3}', "mine.json: no recipe"),
        (made(solver={"name": "nested", "passes": "four"}), r"mine.json: solver nested: passes='four': .*integer"),
        (made(solver={"name": "nested", "weights": [1, "x"]}), r"mine.json: solver nested: weights.1='x'"),
        (made(embeddings="no"), "mine.json: recipe: embeddings='no' must be true or false"),
        (None, "mine.json: cannot be read"),
    ],
)
def test_a_bad_file_is_refused(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ElastiqError, match=sentence):
        recipes.read(tmp_path / "mine.json")
