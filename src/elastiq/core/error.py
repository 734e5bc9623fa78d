"""The one exception a user meets, and how what libraries raise becomes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MOST_REASON = 300
"""Characters of a library's reason that are shown."""


class ElastiqError(Exception):
    """Input, file or request that cannot be handled; the message is one sentence that names the remedy."""


@contextmanager
def library_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises into one sentence: `what` (the first line of its reason); `remedy`.

    Libraries raise what they like, panics of compiled code included, so no list of types is kept. What is ours, what
    the user does and a lack of memory pass as they are.
    """
    try:
        yield
    except (ElastiqError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise ElastiqError(f"{what} ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, with the next where it ends in a colon; its type if it says nothing.

    A KeyError says a key alone, and is named with its type. What is long is cut.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    if not said or isinstance(error, KeyError):
        said = f"{type(error).__name__}: {said}".removesuffix(": ")
    return said if len(said) <= _MOST_REASON else f"{said[:_MOST_REASON]}..."
