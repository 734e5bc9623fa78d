"""Folds and side terms of a matrix in config.json, in unit files and as objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import parts as _kinds  # noqa: F401  (they register themselves)
from ..core import MAX_BITS, Codes, ElastiqError, Fold, Part, QuantizedWeight, RowPowers, SideTerm, Site, Term
from ..runtime.stored import StoredArray, StoredPart
from .tensors import dtype_code, dtype_of

_SHORT = re.compile(r"[a-z][a-z0-9_]{0,40}")
_PREFIX = re.compile(r"(expert_\d{1,5}_)?(side_\d{1,4}_)?")
_MAX_PARTS = 2**16
_MAX_FACTS = 2**12


def stored_parts(sites: Sequence[Site], weights: Mapping[Site, QuantizedWeight]) -> Iterator[tuple[StoredPart, Part]]:
    """Powers of rows, folds and side terms of the matrices of one array, as they are described and as they are."""
    for site in sites:
        weight, expert = weights[site], site.expert
        outer = "" if expert is None else f"expert_{expert}_"
        coded = isinstance(weight.terms[0], Codes)
        side: list[Part] = [term for term in weight.terms if isinstance(term, SideTerm)]
        if not coded:  # what stands in the place of codes has their names
            yield _stored(side.pop(0), outer, expert)
        powers = [] if weight.powers is None else [weight.powers]
        for number, part in enumerate([*powers, *weight.folds, *side]):
            yield _stored(part, f"{outer}side_{number}_", expert)


def _stored(part: Part, prefix: str, expert: int | None) -> tuple[StoredPart, Part]:
    arrays = {
        name: StoredArray(kept.array.dtype, tuple(kept.array.shape), kept.plane, kept.levels)
        for name, kept in part.kept().items()
    }
    return StoredPart(part.kind, prefix, arrays, part.facts(), expert), part


def restored(parts: Sequence[StoredPart], arrays: Mapping[str, Tensor], codes: Codes | None) -> QuantizedWeight:
    """A matrix from its codes, if it has any, and the parts described."""
    found = [part.restore(arrays) for part in parts]
    side: tuple[Term, ...] = tuple(part for part in found if isinstance(part, SideTerm))
    folds = tuple(part for part in found if isinstance(part, Fold))
    powers = next((part for part in found if isinstance(part, RowPowers)), None)
    return QuantizedWeight(side if codes is None else (codes, *side), folds, powers)


def to_rows(parts: Sequence[StoredPart]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [
        {
            "kind": part.kind,
            "prefix": part.prefix,
            "expert": part.expert,
            "facts": dict(part.facts),
            "arrays": {
                name: [dtype_code(a.dtype), list(a.shape), a.plane, list(a.levels)] for name, a in part.arrays.items()
            },
        }
        for part in parts
    ]


def from_rows(rows: object) -> tuple[StoredPart, ...]:
    """What `to_rows` described. Raises ElastiqError for anything else."""
    if not isinstance(rows, list) or len(rows) > _MAX_PARTS:
        raise ElastiqError("the parts of a matrix are not a list")
    return tuple(map(_from_row, rows))


def _from_row(row: Any) -> StoredPart:
    try:
        kind, prefix, expert, facts, arrays = (row[key] for key in ("kind", "prefix", "expert", "facts", "arrays"))
        stored = {name: _array(*spec) for name, spec in arrays.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ElastiqError(f"{str(row)[:60]!r} is not a part of a matrix") from None
    if kind not in Part.registry:
        raise ElastiqError(f"part {kind!r} is of a kind that this elastiq does not know; upgrade it")
    sane = isinstance(prefix, str) and _PREFIX.fullmatch(prefix) and all(_SHORT.fullmatch(name) for name in stored)
    whole = expert is None or (type(expert) is int and 0 <= expert < 2**16)
    if not sane or not whole or not isinstance(facts, dict) or len(str(facts)) > _MAX_FACTS:
        raise ElastiqError(f"part {kind!r} is not described as it should be")
    return StoredPart(kind, prefix, stored, facts, expert)


def _array(code: str, shape: list[int], plane: int, levels: list[int]) -> StoredArray:
    dtype: torch.dtype = dtype_of(code)
    sizes_are_whole = all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not sizes_are_whole or not all(type(n) is int and 1 <= n <= MAX_BITS for n in (plane, *levels)):
        raise ValueError
    return StoredArray(dtype, tuple(shape), plane, tuple(levels))
