"""Matrices cut into parts that may have levels of their own: rows that matter alike, or single experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import CheckpointReader
from ..kernels.matmul.tiles import ROWS
from ..runtime import StoredMatrix

MOST_PARTS = 16
"""Parts of one matrix; more of them gain little (docs/allocation.md)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cut:
    """The parts of a matrix. members: rows (of a fused tensor: experts) of every part, each in one. losses: [parts,
    levels], by which the matrix's loss at a level is shared among them."""

    members: tuple[tuple[int, ...], ...]
    losses: Floats

    @staticmethod
    def of(matrix: StoredMatrix, rows: Floats) -> Cut | None:
        """Parts by what each row loses at each level, `rows` [levels, rows]; None where a matrix has no parts.

        Every expert is a part. Rows are put together by falling loss, whole tiles of the products at a time, so that
        parts of one level leave no tile half empty.
        """
        if matrix.members == 1:
            return None
        if matrix.fused:
            losses = rows.reshape(len(rows), matrix.members, -1).sum(axis=2)
            return Cut(tuple((expert,) for expert in range(matrix.members)), losses.T)
        if matrix.members <= ROWS:
            return None
        totals = rows.sum(axis=1, keepdims=True)
        importance = np.divide(rows, totals, out=np.zeros_like(rows), where=totals > 0).sum(axis=0)
        order = np.argsort(-importance, kind="stable")
        size = ROWS * -(-matrix.members // (ROWS * MOST_PARTS))
        parts = [order[first : first + size] for first in range(0, matrix.members, size)]
        return Cut(
            tuple(tuple(part.tolist()) for part in parts), np.array([rows[:, part].sum(axis=1) for part in parts])
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; members as text, which is a third as long."""
        return {"members": [" ".join(map(str, part)) for part in self.members], "losses": self.losses.tolist()}

    @staticmethod
    def from_dict(data: Mapping[str, Any], matrix: StoredMatrix, levels: int) -> Cut:
        """The cut with the losses of the first `levels` levels, of those it was measured at.

        Raises ValueError, TypeError or KeyError for anything that is not a cut of `matrix`.
        """
        members = tuple(tuple(map(int, part.split())) for part in data["members"])
        losses = np.array([row[:levels] for row in data["losses"]], dtype=np.float64)
        if sorted(member for part in members for member in part) != list(range(matrix.members)) or not all(members):
            raise ValueError("parts that are not the whole matrix")
        if losses.shape != (len(members), levels) or not np.isfinite(losses).all() or (losses < 0).any():
            raise ValueError("losses that are none")
        return Cut(members, losses)


def expert_cuts(reader: CheckpointReader) -> dict[str, Cut]:
    """Every expert a part, sharing by output error and energy as far as the level table knows them."""
    cuts = {}
    for name, matrix in reader.manifest.matrices.items():
        if matrix.fused and matrix.members > 1:
            rows = {row["name"]: row for row in reader.table if row["tensor"] == name}
            losses = [_share(rows.get(f"{name}.{expert}", {}), reader.levels) for expert in range(matrix.members)]
            cuts[name] = Cut(tuple((expert,) for expert in range(matrix.members)), np.array(losses))
    return cuts


def known(value: object) -> bool:
    """Whether a cell of the level table holds an error or an energy."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _share(row: Mapping[str, Any], levels: tuple[int, ...]) -> list[float]:
    errors = [row.get("levels", {}).get(str(level), {}).get("error") for level in levels]
    energy = row.get("energy") if known(row.get("energy")) else 1.0
    return [error * energy if known(error) else 0.0 for error in errors]
