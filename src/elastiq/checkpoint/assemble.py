"""Merge the units of a run into the files of a checkpoint, one array in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import ArraySpec, ElastiqError, Recipe, held
from ..runtime.stored import StoredMatrix
from .files import json_bytes, range_chunks, spelled, sync_directory, write_durably
from .manifest import Manifest
from .names import (
    BASE,
    CHECKSUMS,
    CONFIG,
    FINGERPRINT,
    FORMAT_VERSION,
    INDEX,
    LEVELS,
    RECIPE,
    is_array_name,
    plane_file,
    travels_along,
)
from .tensors import num_bytes, read_header, tensor_bytes, write_tensors
from .units import Unit, unit_beside


def assemble(
    result: Path,
    units: list[Unit],
    tuned: list[Path],
    base: Iterator[tuple[str, Tensor]],
    source_dir: Path,
    config: dict[str, Any],
    recipe: Recipe,
    info: dict[str, Any],
    fingerprint: dict[str, Any],
) -> None:
    """Fill the empty directory `result` with a whole checkpoint, durably; arrays in `tuned` replace the units' own,
    whose errors in the level table are unknown then."""
    manifest = _manifest(units, recipe)
    digests: dict[str, dict[str, Any]] = {}
    sources = [*(unit.path for unit in units), *tuned]
    beside = {name: values for unit in units for name, values in unit_beside(unit).items()}
    changed = ((name, held(beside[name], tensor.dtype) if name in beside else tensor) for name, tensor in base)
    base_specs, digests[BASE] = write_base(result, changed, manifest)
    for plane in range(1, manifest.planes + 1):
        digests[plane_file(plane)] = _write_plane(result / plane_file(plane), plane, manifest, sources)
    for path in sorted(source_dir.iterdir()):
        if travels_along(path.name) and path.is_file():
            digests[path.name] = write_durably(result / path.name, range_chunks(path, 0, path.stat().st_size))
    documents = {
        CONFIG: spelled({**config, "quantization_config": manifest.to_dict()}),
        RECIPE: recipe.to_dict(),
        FINGERPRINT: fingerprint,
        LEVELS: _level_table(units, tuned, manifest, digests, info),
        INDEX: index(manifest, base_specs),
    }
    for name, data in documents.items():
        digests[name] = write_durably(result / name, [json_bytes(data, name)])
    write_durably(result / CHECKSUMS, [json_bytes(checksums(digests), CHECKSUMS)])
    sync_directory(result)


def index(manifest: Manifest, base: dict[str, ArraySpec]) -> dict[str, Any]:
    """Content of model.safetensors.index.json: where every array of the directory is."""
    arrays = [manifest.plane_arrays(plane) for plane in range(1, manifest.planes + 1)]
    total = sum(num_bytes(spec) for specs in (base, *arrays) for spec in specs.values())
    return {"metadata": {"total_size": total}, "weight_map": manifest.weight_map(base)}


def checksums(digests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Content of checksums.json."""
    return {"format_version": FORMAT_VERSION, "files": digests}


def write_base(
    result: Path, base: Iterable[tuple[str, Tensor]], manifest: Manifest
) -> tuple[dict[str, ArraySpec], dict[str, Any]]:
    """Write what is not quantized as it comes, then once more in the order of names; shapes and digest."""
    spool = result / "base.spool"
    taken = {name for plane in range(1, manifest.planes + 1) for name in manifest.plane_arrays(plane)}
    taken |= manifest.matrices.keys()
    specs: dict[str, ArraySpec] = {}
    starts: dict[str, int] = {}
    with open(spool, "wb") as file:
        for name, tensor in base:
            if not is_array_name(name) or name in specs or name in taken:
                raise ElastiqError(f"{name}: given twice for base.safetensors, quantized as well, or not a plain name")
            wide = tensor.is_floating_point() and tensor.element_size() > 2
            stored = held(tensor, torch.float16) if wide else tensor
            specs[name], starts[name] = (stored.dtype, tuple(stored.shape)), file.tell()
            file.write(tensor_bytes(stored))

    def payload(name: str) -> Iterator[bytes]:
        return range_chunks(spool, starts[name], num_bytes(specs[name]))

    written = write_tensors(result / BASE, specs, payload)
    spool.unlink()
    return specs, written


def _manifest(units: list[Unit], recipe: Recipe) -> Manifest:
    matrices: dict[str, StoredMatrix] = {}
    for unit in units:
        repeated = sorted(set(unit.matrices) & set(matrices))
        if repeated:
            raise ElastiqError(f"{', '.join(repeated)}: in more than one unit")
        matrices |= unit.matrices
    if not matrices:
        raise ElastiqError("checkpoint: no matrix was quantized; there is nothing to write")
    kinds = {(matrix.levels, matrix.symmetric) for matrix in matrices.values()}
    if len(kinds) != 1:
        raise ElastiqError(f"checkpoint: all matrices must share their levels and symmetry, found {sorted(kinds)}")
    ((levels, symmetric),) = kinds
    sizes = {matrix.group_size for matrix in matrices.values()}
    group_size = getattr(recipe.format, "group_size", None) or (sizes.pop() if len(sizes) == 1 else -1)
    ordered = dict(sorted(matrices.items()))
    return Manifest(levels, levels[-1], symmetric, recipe.embeddings, group_size, ordered)


def _write_plane(path: Path, plane: int, manifest: Manifest, sources: list[Path]) -> dict[str, Any]:
    entries = {name: (source, entry) for source in sources for name, entry in read_header(source)[0].items()}

    def payload(name: str) -> Iterator[bytes]:
        source, entry = entries[name]
        return range_chunks(source, entry.start, entry.end - entry.start)

    return write_tensors(path, manifest.plane_arrays(plane), payload)


def _level_table(
    units: list[Unit],
    tuned: list[Path],
    manifest: Manifest,
    digests: dict[str, dict[str, Any]],
    info: dict[str, Any],
) -> dict[str, Any]:
    weights = sum(matrix.num_weights for matrix in manifest.matrices.values())
    replaced = {name for path in tuned for name in read_header(path)[0]}
    levels = {}
    for level in manifest.levels:
        num_bits = sum(matrix.num_bits(level) for matrix in manifest.matrices.values())
        files = [BASE, *(plane_file(plane) for plane in range(1, level + 1))]
        levels[str(level)] = {
            "num_bits": num_bits,
            "bits_per_weight": num_bits / weights,
            "file_bytes": sum(digests[name]["size"] for name in files),
        }
    return {
        "format_version": FORMAT_VERSION,
        "matrices": [_row(row, replaced) for unit in units for row in unit.rows],
        "totals": {"weights": weights, "levels": levels},
        "info": info,
    }


def _row(row: dict[str, Any], replaced: set[str]) -> dict[str, Any]:
    """A row of the level table, without the errors of levels whose scales were replaced."""
    levels = {
        level: {**cell, "error": None} if f"{row['tensor']}.scale_{level}" in replaced else cell
        for level, cell in row["levels"].items()
    }
    return {**row, "levels": levels}
