"""Matrices that serving engines fuse into one, and that therefore should share a level."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Last parts of the names of siblings that become one matrix."""
_EXPERTS = re.compile(r"(.*\.experts)\..*")


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """`names` of matrices in groups: query, key and value; gate and up; all experts of a layer; the rest alone."""
    groups: dict[tuple[str, int], list[str]] = {}
    for index, name in enumerate(names):
        parent, _, leaf = name.rpartition(".")
        experts = _EXPERTS.fullmatch(name)
        kind = next((k for k, leaves in enumerate(_FUSED) if leaf in leaves), None)
        if experts:
            key = (experts.group(1), -1)
        elif kind is not None:
            key = (parent, kind)
        else:
            key = (name, -2 - index)
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]
