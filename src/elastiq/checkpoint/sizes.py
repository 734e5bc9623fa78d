"""What a checkpoint takes at each width, counted from its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core import Width, widest, width_counts
from ..kernels.matmul.tiles import INPUTS, ROWS
from ..runtime.stored import StoredMatrix
from .names import BASE, MADE_LATER, plane_file
from .reader import CheckpointReader


def level_sizes(reader: CheckpointReader, widths: Sequence[int]) -> dict[int, dict[str, Any]]:
    """`map_sizes` of uniform maps by width."""
    return {bits: map_sizes(reader, dict.fromkeys(reader.manifest.matrices, bits)) for bits in widths}


def map_sizes(
    reader: CheckpointReader, widths: Mapping[str, Width], dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a checkpoint takes whose matrices are read at `widths`: mean_bits, bits_per_weight, bytes_in_memory (as
    `map_bytes`), bytes_on_disk (the directory's files less the planes that no matrix reads)."""
    files = checkpoint_files(reader)
    unread = range(max(map(widest, widths.values())) + 1, reader.planes + 1)
    return {
        "mean_bits": map_mean_bits(reader, widths),
        "bits_per_weight": map_bits_per_weight(reader, widths),
        "bytes_in_memory": map_bytes(reader, widths, dtype),
        "bytes_on_disk": sum(files.values()) - sum(files[plane_file(plane)] for plane in unread),
    }


def map_mean_bits(reader: CheckpointReader, widths: Mapping[str, Width]) -> float:
    """Mean code width over the quantized weights."""
    total = 0
    for name, matrix in reader.manifest.matrices.items():
        counts = width_counts(widths[name], matrix.members)
        total += sum(matrix.num_weights * bits * count // matrix.members for bits, count in counts.items())
    return total / _weights(reader)


def map_bits_per_weight(reader: CheckpointReader, widths: Mapping[str, Width]) -> float:
    """Stored bits that are read per quantized weight: planes, and scales and zero points of the active level."""
    matrices = reader.manifest.matrices
    return sum(m.num_bits(widths[name]) for name, m in matrices.items()) / _weights(reader)


def map_bytes(reader: CheckpointReader, widths: Mapping[str, Width], dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the arrays that a model loaded at `widths` holds: planes with the scales that travel with them, and
    embeddings, norms and everything else that is not quantized in `dtype`, which is float32 on a processor. Tables that
    a model computes for itself, such as rotary frequencies, are no part of a checkpoint and not counted."""
    return base_bytes(reader, dtype) + sum(held_bytes(m, widths[name]) for name, m in reader.manifest.matrices.items())


def held_bytes(matrix: StoredMatrix, bits: Width) -> int:
    """Bytes of the first `bits` planes of a matrix with their scales, as a model holds them: in whole tiles. Rows or
    experts of one width are held together, and 4 bytes for each that say where."""
    if isinstance(bits, str):
        counts = width_counts(bits, matrix.members)
        return 4 * len(bits) + sum(held_bytes(matrix.some(count), width) for width, count in counts.items())
    count = 0
    for plane in range(1, bits + 1):
        tiled = matrix.tiled_arrays(plane)
        for name, (dtype, shape) in (matrix.arrays(plane) | tiled).items():
            if name in tiled:
                *experts, rows, columns = shape
                columns += -columns % (INPUTS // 8) if dtype == torch.uint8 else 0
                shape = (*experts, rows + -rows % ROWS, columns)
            count += math.prod(shape) * dtype.itemsize
    return count


def _weights(reader: CheckpointReader) -> int:
    return sum(matrix.num_weights for matrix in reader.manifest.matrices.values())


def checkpoint_files(reader: CheckpointReader) -> dict[str, int]:
    """Bytes of every file of the checkpoint: what stays in 16 bits, the planes in order, then everything else."""
    first = [BASE, *(plane_file(plane) for plane in range(1, reader.planes + 1))]
    rest = sorted(f.name for f in reader.path.iterdir() if f.is_file() and f.name not in {*first, *MADE_LATER})
    return {name: (reader.path / name).stat().st_size for name in first + rest}


def base_bytes(reader: CheckpointReader, dtype: torch.dtype | None = torch.float32) -> int:
    """Bytes of everything that is not quantized, its floating-point arrays in `dtype`, or as stored for None."""
    return sum(
        math.prod(shape) * (dtype if dtype is not None and stored.is_floating_point else stored).itemsize
        for stored, shape in reader.base_specs.values()
    )


def full_bytes(reader: CheckpointReader) -> int:
    """Bytes of the model with all its matrices, and what is not quantized, in 16 bits as it is stored."""
    return base_bytes(reader, None) + 2 * sum(matrix.num_weights for matrix in reader.manifest.matrices.values())


def megabytes(count: int) -> str:
    """A size as people read it: `12.3 MB` (of 10^6 bytes)."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )

