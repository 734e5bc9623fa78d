"""Reading the rows of levels.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def level_error(row: dict[str, Any], level: int) -> float | None:
    """Relative output error of a matrix at a level, None where it was not measured."""
    error = row["levels"].get(str(level), {}).get("error")
    return float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None


def mean_error(table: Iterable[dict[str, Any]], level: int) -> float | None:
    """Mean of `level_error` over the matrices, None where none was measured."""
    errors = [error for row in table if (error := level_error(row, level)) is not None]
    return sum(errors) / len(errors) if errors else None
