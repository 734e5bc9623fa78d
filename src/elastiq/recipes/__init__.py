"""Published methods and our own, each as a recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core import ElastiqError, Recipe
from .gptq import gptq
from .nested import nested
from .nested_tuned import nested_tuned
from .rtn import rtn

_ALL: dict[str, Callable[..., Recipe]] = {"nested": nested, "nested-tuned": nested_tuned, "gptq": gptq, "rtn": rtn}


def names() -> tuple[str, ...]:
    """Names that `get` knows."""
    return tuple(_ALL)


def get(name: str, **options: Any) -> Recipe:
    """The recipe called `name` with these options. Raises ElastiqError for a name that does not exist."""
    if name not in _ALL:
        raise ElastiqError(f"recipe {name!r} does not exist; known: {', '.join(_ALL)}")
    return _ALL[name](**options)


__all__ = ["get", "gptq", "names", "nested", "nested_tuned", "rtn"]
