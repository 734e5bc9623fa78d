"""What a matrix is in every block."""

from __future__ import annotations

import re
from collections.abc import Sequence


def kind(name: str) -> str:
    """The name of a matrix without the numbers of its block and expert: `mlp.up_proj`."""
    in_block = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"\.\d+(?=\.|$)", "", in_block)


def short_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """The last part of every kind where that is enough to tell them apart."""
    last = [k.rsplit(".", 1)[-1] for k in kinds]
    return {k: part if last.count(part) == 1 else k for k, part in zip(kinds, last, strict=True)}
