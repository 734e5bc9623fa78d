"""Finished pieces of a run: the arrays of one block in one file, as they will stand in the plane files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Codes, ElastiqError, Grid, Part, QuantizedWeight, SideTerm, Site
from ..linalg import pack_planes, unpack_planes
from ..runtime.stored import StoredMatrix, StoredPart, plane_array
from .parts import from_rows, restored, stored_parts, to_rows
from .tensors import read_header, tensor_bytes, write_tensors

METADATA = "elastiq"
_SCALE = re.compile(r"(?:scale|zero_point)_(\d)")


@dataclass(frozen=True)
class Unit:
    """A unit file read back: its matrices, the site names of each matrix, the rows of the table, and the parameters
    beside the matrices that have other values than the model's."""

    path: Path
    matrices: dict[str, StoredMatrix]
    sites: dict[str, list[str]]
    rows: list[dict[str, Any]]
    beside: tuple[str, ...] = ()


def write_unit_file(
    path: Path,
    weights: dict[Site, QuantizedWeight],
    rows: list[dict[str, Any]],
    beside: Mapping[str, Tensor],
) -> None:
    """Write the planes and scales of `weights`, and new values of parameters `beside` them. Raises ElastiqError for
    what the format cannot hold."""
    members = _by_tensor(weights)
    codes = {site: _codes(site, weight) for site, weight in weights.items()}
    parts = {tensor: list(stored_parts(sites, weights)) for tensor, sites in members.items()}
    matrices = {
        tensor: _stored(tensor, sites, codes, weights, tuple(stored for stored, _ in parts[tensor]))
        for tensor, sites in members.items()
    }
    _check_rows(path.stem, rows, weights)
    specs = {
        f"{matrix.name}.{short}": spec
        for matrix in matrices.values()
        for plane in range(1, matrix.levels[-1] + 1)
        for short, spec in matrix.arrays(plane).items()
    }
    specs |= {name: (values.dtype, tuple(values.shape)) for name, values in beside.items()}
    payload = _Payload(_present(members, codes), parts, beside)
    description = {
        "matrices": [
            {
                "name": m.name,
                "role": m.role,
                "shape": m.shape,
                "group_size": m.group_size,
                "levels": m.levels,
                "symmetric": m.symmetric,
                "coded": m.coded,
                "scales": m.scales,
                "parts": to_rows(m.parts),
                "sites": [site.name for site in members[m.name]],
            }
            for m in matrices.values()
        ],
        "rows": rows,
        "beside": sorted(beside),
    }
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=False)
    except ValueError:
        raise ElastiqError(
            f"{path.stem}: a row of the level table holds a number that is not finite; use null"
        ) from None
    write_tensors(path, specs, payload, {METADATA: text})


def read_unit_file(path: Path) -> Unit:
    """Description of a unit file; the arrays stay on disk."""
    description = json.loads(read_header(path)[1][METADATA])
    sites = {row["name"]: row.pop("sites") for row in description["matrices"]}
    for row in description["matrices"]:
        row |= {"shape": tuple(row["shape"]), "levels": tuple(row["levels"]), "parts": from_rows(row["parts"])}
    matrices = {row["name"]: StoredMatrix(**row) for row in description["matrices"]}
    return Unit(path, matrices, sites, description["rows"], tuple(description["beside"]))


def unit_weights(unit: Unit) -> dict[str, QuantizedWeight]:
    """The quantized matrices by site name, equal to those that were written."""
    array = _arrays(unit)
    weights = {}
    for matrix in unit.matrices.values():
        names = {name for plane in range(1, matrix.levels[-1] + 1) for name in matrix.arrays(plane)}
        arrays = {name: array(f"{matrix.name}.{name}") for name in names}
        codes = _read_codes(matrix, arrays) if matrix.coded else {}
        for index, site in enumerate(unit.sites[matrix.name]):
            expert = index if matrix.fused else None
            own = [part for part in matrix.parts if part.expert == expert]
            weights[site] = restored(own, arrays, codes.get(index))
    return weights


def unit_beside(unit: Unit) -> dict[str, Tensor]:
    """The new values of parameters beside the matrices, float32."""
    array = _arrays(unit)
    return {name: array(name) for name in unit.beside}


def _arrays(unit: Unit) -> Callable[[str], Tensor]:
    """Arrays of the file by name, mapped."""
    entries, _ = read_header(unit.path)
    data = torch.from_file(str(unit.path), size=unit.path.stat().st_size, dtype=torch.uint8)

    def array(name: str) -> Tensor:
        entry = entries[name]
        return data[entry.start : entry.end].view(entry.dtype).view(entry.shape)

    return array


def _read_codes(matrix: StoredMatrix, arrays: Mapping[str, Tensor]) -> dict[int, Codes]:
    """The nested integer codes of a matrix, or of every expert, by its index."""
    planes = [arrays[plane_array(p)] for p in range(1, matrix.levels[-1] + 1)]
    read = {name: array.float() for r in matrix.levels for name, array in matrix.decode_scales(r, arrays).items()}
    scale = torch.stack([read[f"scale_{r}"] for r in matrix.levels])
    if matrix.symmetric:
        middles = torch.tensor([(2.0**r - 1) / 2 for r in matrix.levels])
        zero_point = middles.view(-1, *[1] * (scale.dim() - 1)).expand_as(scale).clone()
    else:
        zero_point = torch.stack([read[f"zero_point_{r}"] for r in matrix.levels])
    found = {}
    for index in range(matrix.shape[0] if matrix.fused else 1):
        pick = (index,) if matrix.fused else ()
        codes = unpack_planes([plane[pick] for plane in planes], matrix.in_features).contiguous()
        each = (slice(None), *pick)
        grid = Grid(matrix.levels, matrix.group_size, scale[each], zero_point[each], matrix.symmetric, matrix.scales)
        found[index] = Codes(codes, grid)
    return found


def write_tuned_file(
    path: Path, weights: Mapping[Site, QuantizedWeight], levels: Sequence[int], codes: bool, facts: dict[str, Any]
) -> None:
    """Write the scales and zero points that `weights` have at `levels`, with `codes` their planes too, and JSON-ready
    `facts` about them."""
    members = _by_tensor(weights)
    checked = {site: _codes(site, weight) for site, weight in weights.items()}
    matrices = {tensor: _stored(tensor, sites, checked, weights, ()) for tensor, sites in members.items()}
    specs = {
        f"{tensor}.{short}": spec
        for tensor, matrix in matrices.items()
        for plane in range(1, matrix.levels[-1] + 1)
        for short, spec in matrix.arrays(plane).items()
        if (codes and short == plane_array(plane)) or any(short in matrix.scale_arrays(level) for level in levels)
    }
    payload = _Payload(_present(members, checked), {}, {})
    write_tensors(path, specs, payload, {METADATA: json.dumps(facts, sort_keys=True, allow_nan=False)})


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `write_tuned_file` was given."""
    facts: dict[str, Any] = json.loads(read_header(path)[1][METADATA])
    return facts


def _by_tensor(weights: Iterable[Site]) -> dict[str, list[Site]]:
    """Sites by the array they are stored in, experts in their order."""
    members: dict[str, list[Site]] = {}
    for site in weights:
        members.setdefault(site.tensor, []).append(site)
    return {tensor: sorted(sites, key=lambda s: s.expert or 0) for tensor, sites in sorted(members.items())}


class _Payload:
    """Bytes of each array, packing one matrix at a time."""

    def __init__(
        self,
        members: dict[str, list[Codes]],
        parts: Mapping[str, list[tuple[StoredPart, Part]]],
        beside: Mapping[str, Tensor],
    ) -> None:
        self.members = members
        self.kept = dict(beside) | {
            f"{tensor}.{stored.prefix}{short}": kept.array
            for tensor, found in parts.items()
            for stored, part in found
            for short, kept in part.kept().items()
        }
        self.packed: tuple[str, list[list[Tensor]]] = ("", [])

    def __call__(self, name: str) -> Iterator[memoryview]:
        if name in self.kept:
            yield tensor_bytes(self.kept[name])
            return
        tensor, short = name.rsplit(".", 1)
        members = self.members[tensor]
        if scale := _SCALE.match(short):
            for codes in members:
                yield tensor_bytes(codes.grid.arrays(int(scale[1]))[short])
            return
        if self.packed[0] != tensor:
            self.packed = (tensor, [pack_planes(codes.codes, codes.grid.bits) for codes in members])
        plane = 1 if short == "weight" else int(short.removeprefix("plane_"))
        for planes in self.packed[1]:
            yield tensor_bytes(planes[plane - 1])


def _present(members: Mapping[str, list[Site]], codes: Mapping[Site, Codes | None]) -> dict[str, list[Codes]]:
    return {tensor: [c for site in sites if (c := codes[site]) is not None] for tensor, sites in members.items()}


def _codes(site: Site, weight: QuantizedWeight) -> Codes | None:
    """The nested integer codes of a matrix, checked; None if it has none."""
    coded = [isinstance(term, Codes) for term in weight.terms]
    if any(coded[1:]) or not all(c or isinstance(t, SideTerm) for c, t in zip(coded, weight.terms, strict=True)):
        kinds = ", ".join(type(t).__name__ for t in weight.terms)
        raise ElastiqError(f"{site.name}: this format stores nested codes first and side terms after, not ({kinds})")
    term = weight.terms[0]
    if not isinstance(term, Codes):
        return None
    codes, grid = term.codes, term.grid
    groups = -(-site.shape[1] // grid.group_size)
    if tuple(codes.shape) != site.shape or tuple(grid.scale.shape) != (len(grid.levels), site.shape[0], groups):
        raise ElastiqError(
            f"{site.name}: codes {list(codes.shape)} and scales {list(grid.scale.shape)} do not fit {list(site.shape)}"
        )
    if grid.bits < 8 and int(codes.max()) >> grid.bits:
        raise ElastiqError(f"{site.name}: a code is larger than {grid.bits} bits allow")
    if not torch.equal(grid.scale, grid.scale.half().float()) or not torch.isfinite(grid.scale).all():
        raise ElastiqError(f"{site.name}: scales are not finite half-precision values; pass them through to_half")
    if not grid.symmetric and not torch.equal(grid.zero_point, grid.zero_point.half().float()):
        raise ElastiqError(f"{site.name}: zero points are not finite half-precision values; pass them through to_half")
    if grid.scales != "half":
        read = grid.stored(grid.scales)
        if not torch.equal(read.scale, grid.scale) or not torch.equal(read.zero_point, grid.zero_point):
            raise ElastiqError(f"{site.name}: scales are not what {grid.scales} stores; pass them through Grid.stored")
    return term


def _stored(
    tensor: str,
    sites: list[Site],
    codes: Mapping[Site, Codes | None],
    weights: Mapping[Site, QuantizedWeight],
    parts: tuple[StoredPart, ...],
) -> StoredMatrix:
    kinds = {(site.role, site.shape, *_format(site, codes[site], weights[site])) for site in sites}
    experts = [site.expert for site in sites]
    if len(kinds) != 1 or experts not in ([None], list(range(len(sites)))):
        raise ElastiqError(f"{tensor}: its matrices must be all experts from 0 on, of one shape and one format")
    ((role, shape, group_size, levels, symmetric, coded, scales),) = kinds
    whole: tuple[int, ...] = shape if sites[0].expert is None else (len(sites), *shape)
    return StoredMatrix(tensor, role, whole, group_size, levels, symmetric, coded, parts, scales)


def _format(site: Site, codes: Codes | None, weight: QuantizedWeight) -> tuple[int, tuple[int, ...], bool, bool, str]:
    """group_size, levels, symmetric, coded, scales."""
    if codes is not None:
        return codes.grid.group_size, codes.grid.levels, codes.grid.symmetric, True, codes.grid.scales
    levels = getattr(weight.terms[0], "levels", None)
    if not isinstance(levels, tuple):
        raise ElastiqError(f"{site.name}: {type(weight.terms[0]).__name__} has no levels; it cannot stand first")
    return getattr(weight.terms[0], "group_size", site.shape[1]), levels, False, False, "half"


def _check_rows(unit: str, rows: list[dict[str, Any]], weights: dict[Site, QuantizedWeight]) -> None:
    named, written = sorted(str(row.get("name")) for row in rows), sorted(site.name for site in weights)
    if named != written:
        raise ElastiqError(f"{unit}: the level table names {named}, the matrices are {written}")
