"""Text and JSONL files, read the same way wherever a text is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core import ElastiqError


def read_text(path: str | Path, what: str) -> str:
    """The whole file without the byte order mark it may begin with; lines end with a line feed. what: stands for the
    purpose in messages. Raises ElastiqError if the file is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ElastiqError(f"{what}: {path} is not UTF-8; convert it first") from None
    except OSError as error:
        raise ElastiqError(f"{what}: {path} cannot be read ({error.strerror}); give a text file") from None


def read_records(path: str | Path, what: str) -> list[tuple[int, Any]]:
    """Line number, from 1, and value of every line of a JSONL file that is not blank.

    A line ends where JSON ends it: U+2028, U+2029 and U+0085 may stand within a string. Raises ElastiqError, with the
    line's number, for what is not JSON and for text that is none.
    """
    records = []
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if line.strip():
            where = f"{what}: {path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ElastiqError(f"{where}, is not valid JSON ({error}); mend or remove it") from None
            require_characters(json.dumps(value, ensure_ascii=False), where)
            records.append((number, value))
    return records


def require_characters(text: str, where: str) -> None:
    """Raises ElastiqError for half of a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise ElastiqError(
            f"{where}: the text has {half}, half of a surrogate pair and no character; take it out"
        ) from None
