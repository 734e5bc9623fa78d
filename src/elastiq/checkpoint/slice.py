"""A smaller checkpoint from a larger one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..core import ElastiqError
from .assemble import checksums, index
from .files import json_bytes, range_chunks, spelled, sync_directory, write_durably
from .names import BASE, CHECKSUMS, CONFIG, INDEX, plane_file
from .publish import write_aside
from .reader import CheckpointReader


def slice_checkpoint(path: str | Path, bits: int, output: str | Path) -> None:
    """Write to `output` the part of a checkpoint that reads at up to `bits`, with a true index and checksums.

    Every file is checked against its checksum while it is copied; `output` appears whole or not at all. Raises
    ElastiqError if the checkpoint cannot give `bits`, a file was altered, or `output` exists.
    """
    reader = CheckpointReader(path)
    reader.require(bits)
    write_aside(output, False, lambda work: _fill(work, reader, bits))


def narrow(directory: Path, reader: CheckpointReader, bits: int) -> None:
    """Make config.json, index and checksums of `directory` those of its checkpoint's first `bits` planes.

    It holds intact files of the reader's checkpoint, with no plane beyond.
    """
    manifest = dataclasses.replace(reader.manifest, planes=bits)
    digests: dict[str, dict[str, Any]] = {
        name: {"sha256": digest, "size": (directory / name).stat().st_size}
        for name, digest in reader.digests.items()
        if name not in (CONFIG, INDEX) and (directory / name).is_file()
    }
    uncovered = sorted({BASE, *map(plane_file, range(1, bits + 1))} - set(digests))
    if uncovered:
        raise ElastiqError(f"{reader.path}: checksums.json does not cover {uncovered[0]}; copy it from the original")
    documents = {
        CONFIG: spelled({**reader.config, "quantization_config": manifest.to_dict()}),
        INDEX: index(manifest, reader.base_specs),
    }
    for name, data in documents.items():
        digests[name] = write_durably(directory / name, [json_bytes(data, name)])
    write_durably(directory / CHECKSUMS, [json_bytes(checksums(digests), CHECKSUMS)])
    sync_directory(directory)


def _fill(work: Path, reader: CheckpointReader, bits: int) -> None:
    beyond = {plane_file(plane) for plane in range(bits + 1, reader.manifest.planes + 1)}
    for name, digest in sorted(reader.digests.items()):
        source = reader.path / name
        if name in (CONFIG, INDEX) or name in beyond or not source.is_file():
            continue
        written = write_durably(work / name, range_chunks(source, 0, source.stat().st_size))
        if written["sha256"] != digest:
            raise ElastiqError(f"{source}: altered (its checksum is not the recorded one); copy it again")
    narrow(work, reader, bits)
