"""Results kept beside the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json, replace_file, write_named
from ..checkpoint.names import TASKS
from ..core import ElastiqError

FILE = "evaluation.json"


def write_json(path: str | Path, data: Any) -> None:
    """Write a result to the file that a user named. Raises ElastiqError if it cannot be written."""
    write_named(path, _content(data))


def keep_json(path: Path, data: Any) -> None:
    """Replace a file beside a checkpoint. Raises ElastiqError if it cannot be written."""
    replace_file(path, _content(data))


def _content(data: Any) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def read_evaluations(checkpoint: str | Path) -> list[dict[str, Any]]:
    """Every evaluation kept beside a checkpoint, oldest first; nothing where the file is absent or not ours."""
    try:
        kept = json.loads((Path(checkpoint) / FILE).read_text(encoding="utf-8"))["evaluations"]
        return [
            e
            for e in kept
            if isinstance(e["levels"], list) and isinstance(e["protocol"]["text"], str) and "against" in e
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_tasks(checkpoint: str | Path) -> dict[str, Any]:
    """Results kept beside a checkpoint by what they depend on; nothing where the file is absent or not ours."""
    try:
        kept = read_json(Path(checkpoint) / TASKS)["results"]
        return {key: row for key, row in kept.items() if isinstance(row["metrics"], dict)}
    except (ElastiqError, KeyError, TypeError, AttributeError):
        return {}


def row_key(row: Mapping[str, Any]) -> str | float:
    """What tells a row of a result from the others: its map, or its width where it is one."""
    return row["map"] if "map" in row else row["bits"]


def row_order(row: Mapping[str, Any]) -> tuple[float, str]:
    """Rows ascend by mean width, one width before the maps of that mean."""
    return row["bits"], row.get("map", "")


def row_name(row: Mapping[str, Any]) -> str:
    """The same for people: `4`, or `3.37 (map 1a2b3c4d)`."""
    bits = f"{row['bits']:g}"
    return f"{bits} (map {row['map']})" if "map" in row else bits


def keep(checkpoint: str | Path, result: dict[str, Any]) -> None:
    """Merge `result` into the checkpoint's evaluation.json.

    Evaluations with one protocol (text, windows, arithmetic) are one entry: new widths and maps join it, a repeated one
    replaces the old row, except that a run without the full model leaves what was measured against it.
    """
    kept = read_evaluations(checkpoint)
    same = next((e for e in kept if e["protocol"] == result["protocol"]), None)
    if same is not None and result["against"] in (None, same.get("against")):
        kept[kept.index(same)] = _merge(same, result)
    else:
        kept = [e for e in kept if e is not same] + [result]
    keep_json(Path(checkpoint) / FILE, {"evaluations": kept})


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    rows = {row_key(row): row for row in old["levels"]}
    for row in new["levels"]:
        rows[row_key(row)] = {**rows.get(row_key(row), {}), **{k: v for k, v in row.items() if v is not None}}
    return {
        **new,
        "against": new["against"] or old.get("against"),
        "full": new["full"] if new["against"] else old["full"],
        "levels": [_complete(row) for row in sorted(rows.values(), key=row_order)],
    }


def _complete(row: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(("kl_mean", "kl_p99", "kl_max", "top1_agreement")), **row}
