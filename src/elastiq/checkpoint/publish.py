"""Something new at a path: made aside, in a directory marked as ours, then put there by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ..core import ElastiqError
from .files import disk_errors, sync_directory, sync_tree
from .lock import try_lock
from .names import BASE, CHECKSUMS

MARK = "made-by-elastiq"
"""File that marks a work directory as ours. It is the lock as well, the first thing made in it and the last removed."""
_AGAIN = "run the same command again"


def new_place(output: str | Path) -> Path:
    """The absolute path, links followed, at which something new can appear by a rename.

    Raises ElastiqError, before any work is done, where it cannot: the directory one stands in, the root of a disk, a
    place inside a finished checkpoint, a directory that cannot be written.
    """
    place = Path(os.path.realpath(output))
    for parent in place.parents:
        if os.path.isfile(parent / CHECKSUMS) and os.path.isfile(parent / BASE):
            raise ElastiqError(f"{output}: lies inside the checkpoint {parent}; choose another output")
    if place == Path.cwd() or os.path.ismount(place):
        what = "the directory you are in" if place == Path.cwd() else "the root of a disk"
        raise ElastiqError(f"{output}: it is {what}, which cannot be replaced; give a new directory inside it")
    there = next(parent for parent in place.parents if os.path.lexists(parent))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ElastiqError(f"{output}: nothing can be written in {there}; choose another output")
    return place


def is_vacant(place: Path) -> bool:
    """Whether nothing is there, or an empty directory."""
    return not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class WorkDirectory:
    """`<output>.<kind>`, marked as ours and locked: what is to appear at `output` is made in it.

    Only a directory with our mark, or an empty one, is taken over and emptied, and never a link. Closing gives the lock
    back and leaves what is in it. Raises ElastiqError where something else is in the way, or a live process holds it.
    """

    def __init__(self, output: Path, kind: str) -> None:
        self.output, self.path = output, output.with_name(f"{output.name}.{kind}")
        with disk_errors(output, _AGAIN):
            lock = self._take()
        if lock is None:
            raise ElastiqError(f"{output}: another process is writing it; wait for it, or choose another output")
        self._lock = lock

    def clear(self, keep: Set[str] = frozenset()) -> None:
        """Remove everything but the mark and what is named."""
        for path in self.path.iterdir():
            if path.name not in {MARK, *keep}:
                remove(path)

    def publish(self, result: Path) -> None:
        """Put the file or directory `result` at `output`, durably. Raises ElastiqError if something is there."""
        sync_tree(result)
        if not is_vacant(self.output):
            raise ElastiqError(f"{self.output}: exists already; choose another output")
        os.rename(result, self.output)
        sync_directory(self.output.parent)

    def remove(self) -> None:
        """Remove the directory with all in it, and give the lock back."""
        self.clear()
        (self.path / MARK).unlink(missing_ok=True)
        with suppress(OSError):  # another process has taken it over since
            self.path.rmdir()
        self.close()

    def close(self) -> None:
        """Give the lock back; what is in the directory stays."""
        self._lock.close()

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> IO[bytes] | None:
        while True:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # its last holder has just removed the directory
                return try_lock(self.path / MARK)

    def _refuse_foreign(self) -> None:
        mark = self.path / MARK
        ours = os.path.isfile(mark) and not mark.is_symlink()
        if self.path.is_symlink() or not (ours or is_vacant(self.path)):
            raise ElastiqError(
                f"{self.path}: is in the way and does not bear elastiq's mark; move it away, or choose another output"
            )


@contextmanager
def scratch(output: str | Path, kind: str) -> Iterator[WorkDirectory]:
    """An empty work directory beside `output` for as long as the context lasts; nothing of it remains."""
    with WorkDirectory(new_place(output), kind) as work:
        try:
            work.clear()
            yield work
        finally:
            work.remove()


def write_aside(output: str | Path, is_file: bool, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file or an empty directory beside `output`, then rename it: `output` holds all of it or is
    not there.

    Raises ElastiqError if something is at `output` already, or another process is writing it.
    """
    place = new_place(output)
    if not is_vacant(place) or (is_file and place.exists()):
        raise ElastiqError(f"{output}: exists already; choose another output")
    with disk_errors(Path(output), _AGAIN), scratch(place, "writing") as work:
        result = work.path / "result"
        if not is_file:
            result.mkdir()
        write(result)
        work.publish(result)
