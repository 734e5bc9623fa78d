"""What another library's forward calls the things that a token needs, found by looking at its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_CACHES = ("cache", "past_key_values", "cache_params")
"""Names that transformers has given the cache, for functions that say no more about their arguments."""


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of the argument of `forward` that takes a Cache: the one annotated so, else one of the known names.

    transformers calls it `past_key_values` before 5.24 and `cache` since; None where there is none.
    """
    parameters = inspect.signature(forward).parameters
    annotated = (name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation))
    return next(annotated, None) or next((name for name in _CACHES if name in parameters), None)


def takes(forward: Callable[..., Any], argument: str) -> bool:
    """Whether `forward` has an argument of this name."""
    return argument in inspect.signature(forward).parameters


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """`cache` as a keyword argument of a model, none where its forward takes no cache."""
    name = cache_argument(type(model).forward)
    return {} if name is None else {name: cache}
