"""Measure one sensitivity of a checkpoint and keep it beside the level table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..allocate import Measurement, Stored, Table, read_stored, write_stored
from ..allocate.cut import Cut
from ..allocate.losses import table_evidence
from ..checkpoint import CheckpointReader
from ..checkpoint.files import json_bytes, read_json, replace_durably, write_durably
from ..checkpoint.names import PARTIAL_SENSITIVITY
from ..core import Damage, ElastiqError, Evidence, Sensitivity, step_from_dict
from .bench import Bench, read_windows
from .evidence import gather

Progress = Callable[[str, int, int], None]


def measure_sensitivity(
    path: str | Path,
    method: str | Sensitivity,
    text: str | Path | None = None,
    *,
    window: int = 512,
    num_windows: int | None = 4,
    bos: bool = True,
    untie: bool = False,
    device: str = "cpu",
    restart: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """Losses of every matrix and level by `method`, stored in `sensitivity.json` beside the checkpoint.

    text: what the model is run on, for methods that need it; `num_windows` windows of `window` tokens, bos as for
    `evaluate`. Uniform maps are measured on it too, which is what predicts damage. The same measurement is not made
    twice unless `restart`; a killed one resumes. Raises ElastiqError where a text is missing or the checkpoint cannot
    be written.
    """
    begin = time.perf_counter()
    step = _step(method)
    report = progress or (lambda what, done, total: None)
    reader = CheckpointReader(path)
    known = table_evidence(reader, step)
    if step.needs <= {"errors"}:
        rows = tuple(((name,), step.measure(e)) for name, e in known.items())
        return Measurement(step.to_dict(), rows, None, time.perf_counter() - begin)
    if text is None:
        raise ElastiqError(f"sensitivity {step.name}: it runs the model; give a text with --text")
    _, facts = read_windows(path, text, window, num_windows, bos)
    stored = read_stored(reader)
    description = {"method": step.to_dict(), "text": facts, "untie": untie}
    found = stored.named(step.name)
    groups = Table.of(reader, untie).groups if "damage" in step.needs else tuple((n,) for n in reader.manifest.matrices)
    if found is not None and not restart and found.text == facts and {g for g, _ in found.groups} == set(groups):
        return found
    bench = Bench(path, text, window=window, num_windows=num_windows, bos=bos, device=device)
    stored = _with_uniform(reader, stored, bench, report)
    partial_file = _Partial(reader, description, restart)
    evidence = gather(bench, known, bench.blocks, step.needs, report)
    for index, group in enumerate(groups):
        report(f"measuring {step.name}", index, len(groups))
        if group not in partial_file.done:
            lowered = replace(evidence[group[0]], damage=partial(_lower, bench, group))
            partial_file.add(group, step.measure(lowered), keep="damage" in step.needs)
    report(f"measuring {step.name}", len(groups), len(groups))
    cuts = {name: cut for name in evidence if (cut := _cut(reader, step, name, evidence[name]))}
    seconds = partial_file.seconds + time.perf_counter() - begin
    result = Measurement(step.to_dict(), tuple(partial_file.done.items()), bench.text, seconds, cuts)
    write_stored(reader, stored.with_measurement(result))
    partial_file.remove()
    return result


def _step(method: str | Sensitivity) -> Sensitivity:
    if isinstance(method, Sensitivity):
        return method
    return cast(Sensitivity, step_from_dict("sensitivity", {"name": method}))


class _Partial:
    """Groups that are measured already, durable one by one. Another method, text or checkpoint starts over."""

    def __init__(self, reader: CheckpointReader, description: Mapping[str, Any], restart: bool) -> None:
        self.path = reader.path / PARTIAL_SENSITIVITY
        self.description = dict(description)
        self.done: dict[tuple[str, ...], dict[int, float]] = {}
        self.begin = time.perf_counter()
        self.seconds = 0.0
        if self.path.is_file() and not restart:
            data = read_json(self.path)
            if isinstance(data, dict) and data.get("description") == self.description:
                self.seconds = float(data["seconds"])
                self.done = {tuple(g): {int(k): float(v) for k, v in losses.items()} for g, losses in data["groups"]}

    def add(self, group: tuple[str, ...], losses: dict[int, float], keep: bool) -> None:
        self.done[group] = losses
        if keep:
            data = {
                "description": self.description,
                "seconds": self.seconds + time.perf_counter() - self.begin,
                "groups": [[list(g), {str(k): v for k, v in row.items()}] for g, row in self.done.items()],
            }
            content = json_bytes(data, PARTIAL_SENSITIVITY)
            replace_durably(self.path, lambda temporary: write_durably(temporary, [content]))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _cut(reader: CheckpointReader, step: Sensitivity, name: str, evidence: Evidence) -> Cut | None:
    rows = step.rows(evidence)
    return None if rows is None else Cut.of(reader.manifest.matrices[name], rows.double().cpu().numpy())


def _lower(bench: Bench, group: tuple[str, ...], level: int) -> Damage:
    return bench.damage(dict.fromkeys(group, level))


def _with_uniform(reader: CheckpointReader, stored: Stored, bench: Bench, report: Progress) -> Stored:
    """`stored` with the damage of every uniform map on the bench's text, written at once."""
    if stored.uniform_text == bench.text and set(stored.uniform) == set(reader.levels):
        return stored
    uniform = {}
    for index, level in enumerate(reader.levels):
        report("measuring uniform maps", index, len(reader.levels))
        uniform[level] = bench.damage(dict.fromkeys(bench.nested, level))
    stored = Stored(stored.measurements, uniform, bench.text)
    write_stored(reader, stored)
    return stored
