"""Write a checkpoint block by block, so that a killed run loses one block at most."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..core import ElastiqError, QuantizedWeight, Recipe, Site
from .assemble import assemble
from .files import disk_errors, is_temporary, json_bytes, read_checksums, read_json, replace_durably, write_durably
from .fingerprint import differences
from .manifest import Manifest
from .names import CHECKSUMS, CONFIG, FINGERPRINT, MADE_LATER
from .publish import WorkDirectory, is_vacant, new_place, remove
from .units import read_facts, read_unit_file, unit_beside, unit_weights, write_tuned_file, write_unit_file

_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,100}")
_KIND = "partial"
_RESUME = "run the same command again (finished blocks are kept)"


def work_directory(output: Path) -> Path:
    """Where a run keeps its finished blocks until the checkpoint is whole."""
    return output.with_name(f"{output.name}.{_KIND}")


def is_finished(output: str | Path, fingerprint: dict[str, Any]) -> bool:
    """Whether `output` is the finished checkpoint of a run with this fingerprint; clears what such a run left over.

    False where nothing is there yet. Raises ElastiqError if something else is there, or a checkpoint made from
    something else (naming the difference), or a damaged one.
    """
    output = new_place(output)
    if is_vacant(output):
        return False
    manifest = _refuse_other(output, _plain(fingerprint))
    if manifest.planes < manifest.levels[-1]:
        raise ElastiqError(f"{output}: a slice of the checkpoint is there; choose another output")
    for name, row in read_checksums(output).items():
        path = output / name
        if not path.is_file() or path.stat().st_size != row.get("size"):
            raise ElastiqError(f"{output}: {name} is missing or cut short; copy it again, or start over with --restart")
    if work_directory(output).is_dir():
        with suppress(ElastiqError), WorkDirectory(output, _KIND) as work:  # or another process has it
            work.remove()
    return True


class CheckpointWriter:
    """Collects units (one per block) durably in `<output>.partial`, then makes the whole checkpoint at once.

    fingerprint: JSON-ready description of everything the bytes depend on (recipe, model, calibration, ...). A run that
    finds units of another fingerprint, or another checkpoint at `output`, is refused with what differs; with `restart`
    it starts over and replaces that checkpoint. One process at a time: the lock dies with its holder. Use it as a
    context manager, or `close` it.
    """

    def __init__(self, output: str | Path, fingerprint: dict[str, Any], restart: bool = False) -> None:
        self.output = new_place(output)
        self.fingerprint = _plain(fingerprint)
        with disk_errors(self.output, _RESUME):
            _check_output(self.output, self.fingerprint, restart)
            self._room = WorkDirectory(self.output, _KIND)
            self.work = self._room.path
            try:
                _check_output(self.output, self.fingerprint, restart)
                self._open(restart)
            except BaseException:
                self.close()
                raise

    def finished(self) -> set[str]:
        """Names of the durable units."""
        return {path.stem for path in self._units.glob("*.safetensors")}

    def write_unit(
        self,
        unit: str,
        weights: dict[Site, QuantizedWeight],
        rows: list[dict[str, Any]],
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the matrices of one unit durable; `rows` are their entries of the level table, one per site. beside:
        parameter -> float32 values that take the place of the base's."""
        path = self._unit_path(unit)
        with disk_errors(self.output, _RESUME):
            replace_durably(path, lambda temporary: write_unit_file(temporary, weights, rows, beside or {}))

    def read_unit(self, unit: str) -> dict[str, QuantizedWeight]:
        """The matrices of a durable unit by site name."""
        return unit_weights(read_unit_file(self._unit_path(unit)))

    def read_beside(self, unit: str) -> dict[str, Tensor]:
        """The parameters beside them that have new values."""
        return unit_beside(read_unit_file(self._unit_path(unit)))

    def tuned(self) -> dict[int, dict[str, Any]]:
        """Levels whose tuned scales are durable, with the facts they were written with."""
        facts = [read_facts(path) for path in sorted(self._tuned.glob("*.safetensors"))]
        return {int(level): row for each in facts for level, row in each.items()}

    def write_tuned(
        self, facts: Mapping[int, dict[str, Any]], weights: Mapping[Site, QuantizedWeight], codes: bool
    ) -> None:
        """Make the scales and zero points of some levels durable, with `codes` the codes too; they take the place of
        those in the units. facts: level -> what is to be known about it."""
        name = "-".join(map(str, facts))
        text = {str(level): row for level, row in facts.items()}
        with disk_errors(self.output, _RESUME):
            replace_durably(
                self._tuned / f"{name}.safetensors",
                lambda temporary: write_tuned_file(temporary, weights, list(facts), codes, text),
            )

    def side_file(self, name: str) -> Path:
        """Where a file of the run is or will be that tuning needs; it goes when the run is finished."""
        return self._tuned / name

    def write_side_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` fill that file; it holds all of it or what it held before."""
        with disk_errors(self.output, _RESUME):
            replace_durably(self.side_file(name), write)

    def finish(
        self,
        base: Iterator[tuple[str, Tensor]],
        source_dir: Path,
        config: dict[str, Any],
        recipe: Recipe,
        info: dict[str, Any],
        check: Callable[[Path], object] = lambda result: None,
    ) -> None:
        """Merge the units into the checkpoint and put it at `output` with one rename; the writer is closed afterwards.

        base: everything of the model that is not in a unit, parameters and persistent buffers, each once.
        source_dir: where tokenizer, templates and generation settings are copied from. config: the model's config.json.
        info: JSON-ready facts stored under "info" in levels.json. check: is given the whole checkpoint before it is
        put there, and raises where it must not be.
        """
        units = [read_unit_file(self._unit_path(unit)) for unit in sorted(self.finished())]
        result = self.work / "result"
        with disk_errors(self.output, _RESUME):
            remove(result)
            result.mkdir()
            tuned = sorted(self._tuned.glob("*.safetensors"))
            assemble(result, units, tuned, base, Path(source_dir), config, recipe, info, self.fingerprint)
        check(result)
        with disk_errors(self.output, _RESUME):
            self._publish(result)
        self.close()

    def close(self) -> None:
        """Give the lock back; what is durable stays."""
        self._room.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, restart: bool) -> None:
        self._units, self._tuned = self.work / "units", self.work / "tuned"
        path = self.work / FINGERPRINT
        if path.exists() and not restart:
            changed = differences(_read_fingerprint(self.work), self.fingerprint)
            if changed:
                raise ElastiqError(
                    f"{self.output}: an unfinished run was made from something else: {'; '.join(changed)}; "
                    "start over with --restart, or choose another output"
                )
        else:
            path.unlink(missing_ok=True)
            self._room.clear({FINGERPRINT})
            content = json_bytes(self.fingerprint, FINGERPRINT)
            replace_durably(path, lambda temporary: write_durably(temporary, [content]))
        self._room.clear({FINGERPRINT, self._units.name, self._tuned.name})
        for folder in (self._units, self._tuned):
            if folder.is_symlink():
                raise ElastiqError(f"{folder}: is a link, which elastiq did not make; start over with --restart")
            folder.mkdir(exist_ok=True)
            for leftover in folder.iterdir():
                if is_temporary(leftover.name):
                    leftover.unlink()

    def _unit_path(self, unit: str) -> Path:
        if not _UNIT.fullmatch(unit):
            raise ElastiqError(f"unit {unit!r}: use letters, digits, - and _ only")
        return self._units / f"{unit}.safetensors"

    def _publish(self, result: Path) -> None:
        if not is_vacant(self.output):  # only a checkpoint that --restart may replace gets here
            os.rename(self.output, self.work / "replaced")
        self._room.publish(result)
        self._room.remove()


def _plain(fingerprint: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json_bytes(fingerprint, "fingerprint"))
    return plain


def _check_output(output: Path, fingerprint: dict[str, Any], restart: bool) -> None:
    if is_vacant(output):
        return
    if not restart:
        _refuse_other(output, fingerprint)
        raise ElastiqError(f"{output}: already finished; choose another output, or start over with --restart")
    _refuse_foreign(output)
    ours = {*read_checksums(output), CHECKSUMS, *MADE_LATER}
    strange = sorted(path.name for path in output.iterdir() if path.name not in ours and not is_temporary(path.name))
    if strange:
        raise ElastiqError(f"{output}: holds {', '.join(strange)} besides the checkpoint; move that away first")


def _refuse_other(output: Path, fingerprint: dict[str, Any]) -> Manifest:
    manifest = _refuse_foreign(output)
    changed = differences(_read_fingerprint(output), fingerprint)
    if changed:
        raise ElastiqError(
            f"{output}: a checkpoint made from something else is there: {'; '.join(changed)}; "
            "start over with --restart, or choose another output"
        )
    return manifest


def _refuse_foreign(output: Path) -> Manifest:
    try:
        return Manifest.from_config(read_json(output / CONFIG), str(output))
    except ElastiqError:
        raise ElastiqError(
            f"{output}: holds something that is not an elastiq checkpoint; choose another output"
        ) from None


def _read_fingerprint(directory: Path) -> dict[str, Any]:
    data = read_json(directory / FINGERPRINT)
    if not isinstance(data, dict):
        raise ElastiqError(f"{directory / FINGERPRINT}: not a fingerprint; start over with --restart")
    return data
