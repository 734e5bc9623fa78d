"""Published methods and our own, each as a recipe."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from ..core import ElastiqError, Recipe
from ..transforms import RandomHadamard
from .any_precision import any_precision
from .auto_round import auto_round
from .awq import awq
from .bias import bias
from .bitstack import bitstack
from .decoupleq import decoupleq
from .fp8 import fp8
from .gptq import gptq
from .gsq import gsq
from .hqq import hqq
from .llm_int8 import llm_int8
from .lorc import lorc
from .matquant import matquant
from .mx import mx
from .nested import nested
from .nested_tuned import nested_tuned
from .nested_tuned_blocks import nested_tuned_blocks
from .nf4 import nf4
from .nv import nv
from .pb_llm import pb_llm
from .quarot import quarot
from .quarot_stream import quarot_stream
from .rsq import rsq
from .rtn import rtn
from .smoothquant import smoothquant
from .spqr import spqr

_RECIPES: tuple[Callable[..., Recipe], ...] = (
    nested,
    nested_tuned,
    nested_tuned_blocks,
    gptq,
    rtn,
    any_precision,
    auto_round,
    awq,
    bias,
    bitstack,
    decoupleq,
    fp8,
    gsq,
    hqq,
    llm_int8,
    lorc,
    matquant,
    mx,
    nf4,
    nv,
    pb_llm,
    quarot,
    quarot_stream,
    rsq,
    smoothquant,
    spqr,
)
_ROTATION = RandomHadamard()
_ALL = {recipe.__name__.replace("_", "-"): recipe for recipe in _RECIPES}


def names() -> tuple[str, ...]:
    """Names that `get` knows."""
    return tuple(_ALL)


def get(name: str, *, rotate: bool = False, **options: Any) -> Recipe:
    """The recipe called `name` with these options.

    rotate: after the recipe's own transforms, a random Hadamard rotation of what every matrix is given. Raises
    ElastiqError for a name or an option that does not exist, and for a rotation after a rotation.
    """
    if name not in _ALL:
        raise ElastiqError(f"recipe {name!r} does not exist; known: {', '.join(_ALL)}")
    known = _options(_ALL[name])
    if known and (unknown := sorted(set(options) - set(known))):
        raise ElastiqError(f"recipe {name}: it has no {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        recipe = _ALL[name](**options)
    except TypeError as error:  # of the step that was handed what the recipe does not know
        raise ElastiqError(f"recipe {name}: {error}") from None
    if not rotate:
        return recipe
    if _ROTATION in recipe.transforms:
        raise ElastiqError(f"recipe {name} rotates already")
    return replace(recipe, transforms=(*recipe.transforms, _ROTATION))


def words(recipe: Recipe) -> list[str] | None:
    """What follows --recipe on a command line that makes this recipe; None for one that has no name."""
    found = _words(recipe)
    if found is None and recipe.transforms[-1:] == (_ROTATION,):
        found = _words(replace(recipe, transforms=recipe.transforms[:-1]))
        return found and [*found, "--rotate"]
    return found


def _words(recipe: Recipe) -> list[str] | None:
    format = recipe.format.to_dict()
    keys = ("group_size", "symmetric", "scales") if format["name"] == "integer" else ("group_size",)
    given = {"levels": recipe.levels, **{key: format.get(key) for key in keys}}
    given |= {"embeddings": recipe.embeddings, "inputs": recipe.inputs}
    for name, make in _ALL.items():
        known = _options(make)
        taken = {key: value for key, value in given.items() if value is not None and key in (known or given)}
        try:
            if make(**taken) != recipe:
                continue
        except ElastiqError:
            continue
        found = [name]
        if "levels" in taken:
            found += ["--levels", ",".join(map(str, recipe.levels))]
        if "group_size" in taken:
            found += ["--group-size", str(taken["group_size"])]
        if taken.get("scales", "half") != "half":
            found += ["--scales", str(taken["scales"])]
        found += [f"--{key}" for key in ("symmetric", "embeddings") if taken.get(key)]
        return found + (["--inputs", recipe.inputs] if recipe.inputs != "full" else [])
    return None


def read(path: str | Path) -> Recipe:
    """The recipe in a JSON file, as `Recipe.to_dict` describes it. Raises ElastiqError if there is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
        if not isinstance(data, dict):
            raise ValueError("not an object")
        return Recipe.from_dict(data)
    except OSError as error:
        raise ElastiqError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except ElastiqError as error:
        raise ElastiqError(f"recipe {path}: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ElastiqError(f"recipe {path}: no recipe ({error}); `elastiq recipes nested` prints one") from None


def _finite(text: str) -> float:
    """A number of JSON's, or of those that Python's reader takes besides, such as NaN and 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _options(recipe: Callable[..., Recipe]) -> list[str]:
    """What a recipe takes: its own parameters, and the slots of `Recipe` it leaves open; empty where it hands what it
    does not know to another step."""
    named = inspect.signature(recipe).parameters
    if "recipe" not in named:
        return []
    slots = (field.name for field in fields(Recipe) if field.default is not MISSING)
    return [*(name for name in named if name != "recipe"), *slots]


__all__ = [
    "any_precision",
    "auto_round",
    "awq",
    "bias",
    "bitstack",
    "decoupleq",
    "fp8",
    "get",
    "gptq",
    "gsq",
    "hqq",
    "llm_int8",
    "lorc",
    "matquant",
    "mx",
    "names",
    "nested",
    "nested_tuned",
    "nested_tuned_blocks",
    "nf4",
    "nv",
    "pb_llm",
    "quarot",
    "quarot_stream",
    "read",
    "rsq",
    "rtn",
    "smoothquant",
    "spqr",
    "words",
]
