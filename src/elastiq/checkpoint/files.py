"""Durable writing, bounded reading."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import ElastiqError
from .names import CHECKSUMS, is_plain

CHUNK = 1 << 20
MAX_JSON = 256 << 20
"""Largest JSON file that is read, in bytes."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.elastiq-tmp")
_FLOAT = "__float__"
_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def write_durably(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write buffers to `path` so that they survive a crash; {"sha256", "size"} of what was written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def replace_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`: the path holds all of it or what it held before.

    The temporary file is new, and a link at `path` is replaced: nothing is ever written through a link.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.elastiq-tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(temporary)
        sync_directory(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a killed process left of `replace_durably`."""
    return _TEMPORARY.fullmatch(name) is not None


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file, never through a link. Raises ElastiqError if it cannot be written."""
    try:
        replace_durably(path, lambda temporary: write_durably(temporary, [content]))
    except OSError as error:
        raise ElastiqError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def write_named(path: str | Path, content: bytes) -> None:
    """Write a file that the user named, whole or not at all; a link or a pipe that was named is written through.

    Raises ElastiqError if it cannot be written.
    """
    path = Path(path)
    if not path.is_symlink() and (path.is_file() or not path.exists()):
        replace_file(path, content)
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ElastiqError(f"{path}: cannot be written ({error.strerror}); choose another file") from None


def check_named(path: Path) -> None:
    """Raise ElastiqError, before any work is done, where `write_named` would fail or spoil a checkpoint."""
    place = Path(os.path.realpath(path))
    reason = ""
    if place.is_dir():
        reason = "it is a directory"
    elif not place.parent.is_dir():
        reason = f"there is no directory {place.parent}"
    elif not os.access(place if place.exists() else place.parent, os.W_OK):
        reason = "permission denied"
    elif os.path.isfile(place.parent / CHECKSUMS) and place.name in {CHECKSUMS, *read_checksums(place.parent)}:
        reason = f"it is part of the checkpoint {place.parent}"
    if reason:
        raise ElastiqError(f"{path}: cannot be written ({reason}); choose another file")


def sync_directory(path: Path) -> None:
    """Make renames inside a directory durable, or the content of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Make a file, or a directory and all in it, durable."""
    if path.is_symlink():
        return
    if path.is_dir():
        for file in path.iterdir():
            sync_tree(file)
    sync_directory(path)


def tree_bytes(path: Path) -> int:
    """What the files in a directory take on the disk; links in it count for nothing."""
    rows = (entry.lstat() for entry in path.rglob("*")) if path.is_dir() and not path.is_symlink() else ()
    return sum(512 * row.st_blocks for row in rows if stat.S_ISREG(row.st_mode))


def read_checksums(directory: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"sha256", "size"} of checksums.json. Raises ElastiqError if it is missing or damaged."""
    path = directory / CHECKSUMS
    data = read_json(path)
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict) or not all(
        is_plain(name) and isinstance(row, dict) and isinstance(row.get("sha256"), str) for name, row in files.items()
    ):
        raise ElastiqError(f"{path}: not a table of checksums; copy it from the original checkpoint")
    return files


def json_bytes(data: object, what: str) -> bytes:
    """The one spelling of `data` as JSON. Raises ElastiqError for a number that is not finite."""
    try:
        return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ElastiqError(
            f"{what}: a number in it is not finite ({error}); write null where nothing is known"
        ) from None


def read_json(path: Path) -> Any:
    """What the JSON file holds. Raises ElastiqError if it is missing, larger than MAX_JSON or not JSON."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ElastiqError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no {path.name} is; get it again")
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ElastiqError(f"{path}: cannot be read ({error.strerror}); copy it from the original checkpoint") from None
    except (ValueError, RecursionError):
        raise ElastiqError(f"{path}: not readable as JSON; copy it from the original checkpoint") from None


def spelled(config: Any) -> Any:
    """The content of a config.json with numbers that JSON does not have spelled as transformers spells them: the
    infinity in `time_step_limit` of Mamba 2 is {"__float__": "Infinity"}."""
    if isinstance(config, float) and not math.isfinite(config):
        return {_FLOAT: next(name for name, value in _SPECIAL.items() if repr(value) == repr(config))}
    if isinstance(config, dict):
        return {key: spelled(value) for key, value in config.items()}
    return [spelled(value) for value in config] if isinstance(config, list | tuple) else config


def read_config(path: Path) -> dict[str, Any]:
    """A config.json with such numbers as numbers; raises as `read_json`."""
    config = _unspelled(read_json(path))
    return config if isinstance(config, dict) else {}


def _unspelled(config: Any) -> Any:
    if isinstance(config, dict):
        if config.keys() == {_FLOAT} and isinstance(config[_FLOAT], str) and config[_FLOAT] in _SPECIAL:
            return _SPECIAL[config[_FLOAT]]
        return {key: _unspelled(value) for key, value in config.items()}
    return [_unspelled(value) for value in config] if isinstance(config, list) else config


def range_chunks(path: Path, start: int, size: int) -> Iterator[bytes]:
    """The `size` bytes of a file from `start`, piece by piece."""
    with open(path, "rb") as file:
        file.seek(start)
        while size:
            chunk = file.read(min(size, CHUNK))
            if not chunk:
                raise ElastiqError(f"{path}: ends early; it was changed while it was read")
            size -= len(chunk)
            yield chunk


def sha256(path: Path) -> str:
    """Digest of a whole file. Raises ElastiqError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ElastiqError(f"{path}: cannot be read ({error.strerror}); copy it from the original checkpoint") from None


@contextmanager
def disk_errors(output: Path, remedy: str) -> Iterator[None]:
    """Turn what the file system refuses into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ElastiqError(f"{output}: the disk is full; free some space, then {remedy}") from error
        where = error.filename or output
        raise ElastiqError(f"{output}: cannot write {where} ({error.strerror}); mend that, then {remedy}") from error
