"""Reading the rows of levels.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def level_error(row: Mapping[str, Any], level: int) -> float | None:
    """Relative output error of a matrix at a level, None where it was not measured."""
    error = row["levels"].get(str(level), {}).get("error")
    return float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None


def mean_error(table: Iterable[dict[str, Any]], level: int) -> float | None:
    """Mean of `level_error` over the matrices, None where none was measured."""
    errors = [error for row in table if (error := level_error(row, level)) is not None]
    return sum(errors) / len(errors) if errors else None


def doubts(table: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What whoever made a checkpoint should know, a sentence each: matrices that are no better than zeros at one of
    their levels, and tokens of the calibration that were left out."""
    rows = list(table)
    useless = []
    for row in rows:
        errors = {int(level): level_error(row, int(level)) for level in row["levels"]}
        if bad := {level: error for level, error in errors.items() if error is not None and error >= 1}:
            level = max(bad)
            useless.append(f"{row['name']} up to {level} bits ({bad[level]:.3g})")
    if useless:
        yield (
            f"{_some(useless)}: no better than zeros there (relative output error); read wider levels, or choose "
            "another recipe or smaller groups"
        )
    dropped = [f"{row['name']} ({row['dropped']})" for row in rows if row.get("dropped")]
    if dropped:
        yield (
            f"{_some(dropped)}: so many tokens of the calibration gave numbers that are not finite and were left out; "
            "compute in float32 or bfloat16"
        )


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
