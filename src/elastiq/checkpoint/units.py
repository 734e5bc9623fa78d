"""Finished pieces of a run: the arrays of one block in one file, as they will stand in the plane files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import Codes, ElastiqError, Grid, QuantizedWeight, Site
from ..linalg import pack_planes, unpack_planes
from ..runtime.stored import StoredMatrix, plane_array
from .tensors import read_header, tensor_bytes, write_tensors

METADATA = "elastiq"


@dataclass(frozen=True)
class Unit:
    """A unit file read back: its matrices, the site names of each matrix, the rows of the table."""

    path: Path
    matrices: dict[str, StoredMatrix]
    sites: dict[str, list[str]]
    rows: list[dict[str, Any]]


def write_unit_file(path: Path, weights: dict[Site, QuantizedWeight], rows: list[dict[str, Any]]) -> None:
    """Write the planes and scales of `weights`. Raises ElastiqError for what the format cannot hold."""
    members = _by_tensor(weights)
    codes = {site: _codes(site, weight) for site, weight in weights.items()}
    matrices = {tensor: _stored(tensor, sites, codes) for tensor, sites in members.items()}
    _check_rows(path.stem, rows, weights)
    specs = {
        f"{matrix.name}.{short}": spec
        for matrix in matrices.values()
        for plane in range(1, matrix.levels[-1] + 1)
        for short, spec in matrix.arrays(plane).items()
    }
    payload = _Payload({tensor: [codes[site] for site in sites] for tensor, sites in members.items()})
    description = {
        "matrices": [
            {
                "name": m.name,
                "role": m.role,
                "shape": m.shape,
                "group_size": m.group_size,
                "levels": m.levels,
                "symmetric": m.symmetric,
                "sites": [site.name for site in members[m.name]],
            }
            for m in matrices.values()
        ],
        "rows": rows,
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
    matrices = {
        row["name"]: StoredMatrix(**{**row, "shape": tuple(row["shape"]), "levels": tuple(row["levels"])})
        for row in description["matrices"]
    }
    return Unit(path, matrices, sites, description["rows"])


def unit_weights(unit: Unit) -> dict[str, QuantizedWeight]:
    """The quantized matrices by site name, equal to those that were written."""
    entries, _ = read_header(unit.path)
    data = torch.from_file(str(unit.path), size=unit.path.stat().st_size, dtype=torch.uint8)

    def array(name: str) -> Tensor:
        entry = entries[name]
        return data[entry.start : entry.end].view(entry.dtype).view(entry.shape)

    weights = {}
    for matrix in unit.matrices.values():
        bits = matrix.levels[-1]
        planes = [array(f"{matrix.name}.{plane_array(p)}") for p in range(1, bits + 1)]
        scale = torch.stack([array(f"{matrix.name}.scale_{r}").float() for r in matrix.levels])
        if matrix.symmetric:
            middles = torch.tensor([(2.0**r - 1) / 2 for r in matrix.levels])
            zero_point = middles.view(-1, *[1] * (scale.dim() - 1)).expand_as(scale).clone()
        else:
            zero_point = torch.stack([array(f"{matrix.name}.zero_point_{r}").float() for r in matrix.levels])
        for index, site in enumerate(unit.sites[matrix.name]):
            pick = (index,) if matrix.role == "expert" else ()
            codes = unpack_planes([plane[pick] for plane in planes], matrix.in_features).contiguous()
            each = (slice(None), *pick)
            grid = Grid(matrix.levels, matrix.group_size, scale[each], zero_point[each], matrix.symmetric)
            weights[site] = QuantizedWeight((Codes(codes, grid),))
    return weights


def write_scales_file(path: Path, weights: Mapping[Site, Codes], level: int, facts: dict[str, Any]) -> None:
    """Write the scales and zero points that `weights` have at `level`, and JSON-ready `facts` about them."""
    members = _by_tensor(weights)
    checked = {site: _codes(site, QuantizedWeight((codes,))) for site, codes in weights.items()}
    matrices = {tensor: _stored(tensor, sites, checked) for tensor, sites in members.items()}
    specs = {
        f"{tensor}.{short}": spec
        for tensor, matrix in matrices.items()
        for short, spec in matrix.arrays(1 if level == matrix.levels[0] else level).items()
        if short in matrix.scale_arrays(level)
    }
    payload = _Payload({tensor: [checked[site] for site in sites] for tensor, sites in members.items()})
    write_tensors(path, specs, payload, {METADATA: json.dumps(facts, sort_keys=True, allow_nan=False)})


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `write_scales_file` was given."""
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

    def __init__(self, members: dict[str, list[Codes]]) -> None:
        self.members = members
        self.packed: tuple[str, list[list[Tensor]]] = ("", [])

    def __call__(self, name: str) -> Iterator[memoryview]:
        tensor, short = name.rsplit(".", 1)
        members = self.members[tensor]
        if short.startswith(("scale_", "zero_point_")):
            kind, level = short.rsplit("_", 1)
            for codes in members:
                values = getattr(codes.grid, kind)[codes.grid.levels.index(int(level))]
                yield tensor_bytes(values.half())
            return
        if self.packed[0] != tensor:
            self.packed = (tensor, [pack_planes(codes.codes, codes.grid.bits) for codes in members])
        plane = 1 if short == "weight" else int(short.removeprefix("plane_"))
        for planes in self.packed[1]:
            yield tensor_bytes(planes[plane - 1])


def _codes(site: Site, weight: QuantizedWeight) -> Codes:
    term = weight.terms[0] if len(weight.terms) == 1 else None
    if not isinstance(term, Codes):
        kinds = ", ".join(type(t).__name__ for t in weight.terms)
        raise ElastiqError(f"{site.name}: this format stores one term of nested codes, not ({kinds})")
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
    return term


def _stored(tensor: str, sites: list[Site], codes: dict[Site, Codes]) -> StoredMatrix:
    grids = [codes[site].grid for site in sites]
    kinds = {(site.role, site.shape, g.group_size, g.levels, g.symmetric) for site, g in zip(sites, grids, strict=True)}
    experts = [site.expert for site in sites]
    if len(kinds) != 1 or experts not in ([None], list(range(len(sites)))):
        raise ElastiqError(f"{tensor}: its matrices must be all experts from 0 on, of one shape and one format")
    site, grid = sites[0], grids[0]
    shape = site.shape if site.expert is None else (len(sites), *site.shape)
    return StoredMatrix(tensor, site.role, shape, grid.group_size, grid.levels, grid.symmetric)


def _check_rows(unit: str, rows: list[dict[str, Any]], weights: dict[Site, QuantizedWeight]) -> None:
    named, written = sorted(str(row.get("name")) for row in rows), sorted(site.name for site in weights)
    if named != written:
        raise ElastiqError(f"{unit}: the level table names {named}, the matrices are {written}")
