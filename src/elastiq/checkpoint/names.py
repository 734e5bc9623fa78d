"""File names of a checkpoint directory, and which of them may come from outside."""

from __future__ import annotations

import re

FORMAT_VERSION = 1
QUANT_METHOD = "elastiq"

BASE = "base.safetensors"
CONFIG = "config.json"
RECIPE = "recipe.json"
LEVELS = "levels.json"
FINGERPRINT = "fingerprint.json"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
SENSITIVITY = "sensitivity.json"
PARTIAL_SENSITIVITY = "sensitivity.partial.json"
TASKS = "tasks.json"
EVALUATION = "evaluation.json"
CARD = "README.md"
MADE_LATER = frozenset({EVALUATION, "report.html", SENSITIVITY, PARTIAL_SENSITIVITY, TASKS, CARD})
"""Files that other commands put beside a finished checkpoint; checksums do not cover them."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_ARRAY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,511}")
_SIDE_NAME = re.compile(
    r"(tokenizer|chat_template|vocab|merges|special_tokens_map|added_tokens|tekken|generation_config|LICENSE|NOTICE).*|.*\.(model|tiktoken)"
)
_SIDE_SUFFIX = re.compile(r".*\.(json|txt|jinja|model|tiktoken|md|bpe)|(LICENSE|NOTICE)[^.]*")


def plane_file(plane: int) -> str:
    """Name of the file that holds one plane, counted from 1."""
    return f"plane-{plane}.safetensors"


def is_plain(name: object) -> bool:
    """Whether `name` can only mean a file inside the directory itself."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def is_array_name(name: object) -> bool:
    """Whether `name` may name a matrix or an array."""
    return isinstance(name, str) and _ARRAY.fullmatch(name) is not None


def travels_along(name: str) -> bool:
    """Whether a file of the source model belongs in the checkpoint: tokenizer, templates, generation settings, licence.

    Never code, never weights.
    """
    return bool(_SIDE_NAME.fullmatch(name) and _SIDE_SUFFIX.fullmatch(name) and is_plain(name))


def is_read_along(name: str) -> bool:
    """Whether one of those files says how the model is used: all but the licence, which an owner may add."""
    return travels_along(name) and not name.startswith(("LICENSE", "NOTICE"))
