"""What a run was made from, and how another run differs, in words."""

from __future__ import annotations

import re
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{32,}")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One phrase for everything that is not the same, in the order of the keys."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = sorted(set(before) | set(after))
    return [_phrase(key, before, after) for key in keys if before.get(key, _ABSENT) != after.get(key, _ABSENT)]


class _Absent:
    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()


def _leaves(data: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(data, dict):
        return [(path, data)]
    return [leaf for key, value in data.items() for leaf in _leaves(value, (*path, str(key)))]


def _phrase(key: tuple[str, ...], before: dict[tuple[str, ...], Any], after: dict[tuple[str, ...], Any]) -> str:
    old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
    if any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (old, new)):
        name = f"the {key[0]} text" if key[0] in ("calibration", "tuning") else ".".join(key[1:] or key)
        return f"{name} " + ("is new" if old is _ABSENT else "is gone" if new is _ABSENT else "has changed")
    return f"{'.'.join(key)} was {old!r}, is {new!r}"
