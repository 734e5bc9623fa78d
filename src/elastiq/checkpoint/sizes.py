"""What a checkpoint takes at each width, counted from its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .names import BASE, MADE_LATER, plane_file
from .reader import CheckpointReader


def level_sizes(reader: CheckpointReader, widths: Sequence[int]) -> dict[int, dict[str, Any]]:
    """For each width: bits_per_weight, bytes_in_memory, bytes_on_disk.

    bits_per_weight: over the quantized matrices, planes with the scales and zero points of the active level.
    bytes_in_memory: what a model loaded at that width holds, embeddings included, in the precision it is stored in.
    bytes_on_disk: files of the directory less the planes that are not read.
    """
    files = checkpoint_files(reader)
    matrices = reader.manifest.matrices.values()
    weights = sum(matrix.num_weights for matrix in matrices)
    return {
        bits: {
            "bits_per_weight": sum(matrix.num_bits(bits) for matrix in matrices) / weights,
            "bytes_in_memory": base_bytes(reader) + _held(reader, bits),
            "bytes_on_disk": sum(files.values())
            - sum(files[plane_file(p)] for p in range(bits + 1, reader.planes + 1)),
        }
        for bits in widths
    }


def checkpoint_files(reader: CheckpointReader) -> dict[str, int]:
    """Bytes of every file of the checkpoint: what stays in 16 bits, the planes in order, then everything else."""
    first = [BASE, *(plane_file(plane) for plane in range(1, reader.planes + 1))]
    rest = sorted(f.name for f in reader.path.iterdir() if f.is_file() and f.name not in {*first, *MADE_LATER})
    return {name: (reader.path / name).stat().st_size for name in first + rest}


def base_bytes(reader: CheckpointReader) -> int:
    """Bytes of everything that is not quantized."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in reader.base_specs.values())


def full_bytes(reader: CheckpointReader) -> int:
    """Bytes of the model with all its matrices in 16 bits."""
    return base_bytes(reader) + 2 * sum(matrix.num_weights for matrix in reader.manifest.matrices.values())


def megabytes(count: int) -> str:
    """A size as people read it: `12.3 MB` (of 10^6 bytes)."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def _held(reader: CheckpointReader, bits: int) -> int:
    arrays = (
        spec
        for matrix in reader.manifest.matrices.values()
        for plane in range(1, bits + 1)
        for spec in matrix.arrays(plane).values()
    )
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in arrays)
