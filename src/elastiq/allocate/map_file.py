"""Level maps as JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import CheckpointReader
from ..checkpoint.files import json_bytes, read_json, write_named
from ..core import ElastiqError, LevelMap, Width

_VERSION = 1
_KIND = "elastiq level map"
_MOST_BYTES = 64 << 20


def write_map(path: str | Path, level_map: LevelMap) -> None:
    """Write the whole file or nothing. Raises ElastiqError if it cannot be written."""
    data = {
        "kind": _KIND,
        "format_version": _VERSION,
        "widths": dict(level_map.widths),
        "facts": dict(level_map.facts),
    }
    write_named(path, json_bytes(data, str(path)))


def read_map(path: str | Path) -> LevelMap:
    """The map in a file. Raises ElastiqError for anything that is not one."""
    path = Path(path)
    if not path.is_file():
        raise ElastiqError(f"{path}: no such level map; make one with elastiq allocate CHECKPOINT --bits 3.5 -o {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise ElastiqError(f"{path}: larger than {_MOST_BYTES >> 20} MiB, which no level map is")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise ElastiqError(f"{path}: not a level map; make one with elastiq allocate")
    if data.get("format_version") != _VERSION:
        version = data.get("format_version")
        raise ElastiqError(f"{path}: format version {version!r} is not {_VERSION}; make the map again")
    if not isinstance(data.get("widths"), dict) or not isinstance(data.get("facts", {}), dict):
        raise ElastiqError(f"{path}: its widths are no table; make the map again")
    return LevelMap(data["widths"], data.get("facts", {}))


def complete(reader: CheckpointReader, widths: Mapping[str, Width]) -> dict[str, Width]:
    """`widths` for every matrix of the checkpoint, those not named at the widest. Raises ElastiqError for a name or a
    width the checkpoint does not have."""
    for name, width in widths.items():
        reader.require_for(name, width)
    return dict[str, Width].fromkeys(reader.manifest.matrices, reader.available[-1]) | dict(widths)
