"""What is known about losses: the level table, and measurements kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from .. import sensitivity as _registered  # noqa: F401  (its import fills the registry)
from ..checkpoint import CheckpointReader
from ..checkpoint.files import json_bytes, read_json, replace_durably, write_durably
from ..checkpoint.names import LEVELS, SENSITIVITY
from ..core import Damage, ElastiqError, Evidence, Sensitivity, Step, step_from_dict
from .cut import Cut, expert_cuts, known
from .table import Floats, Table

DEFAULT_ALLOCATOR = "integer-programme"
PREFERRED = ("kl", "sampled-fisher", "output-error")
"""Sensitivities in the order in which they are taken where none is named, as measured (docs/allocation.md); the last
one is always there."""
_VERSION = 1
_MOST = 1e30


@dataclass(frozen=True)
class Measurement:
    """Losses by one method. method: as `Step.to_dict`. groups: matrices measured together, with their losses per
    level. text: what they were measured on, None where nothing was read. seconds: what it took. cuts: matrices in
    parts, where the method tells rows apart."""

    method: Mapping[str, Any]
    groups: tuple[tuple[tuple[str, ...], Mapping[int, float]], ...]
    text: Mapping[str, Any] | None
    seconds: float
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.method["name"])


@dataclass(frozen=True)
class Stored:
    """Everything kept beside a checkpoint. uniform: damage of every uniform map on `uniform_text`."""

    measurements: tuple[Measurement, ...] = ()
    uniform: Mapping[int, Damage] = field(default_factory=dict)
    uniform_text: Mapping[str, Any] | None = None

    def named(self, name: str) -> Measurement | None:
        return next((m for m in self.measurements if m.name == name), None)

    def with_measurement(self, new: Measurement) -> Stored:
        """The same, a method's older measurement replaced."""
        kept = tuple(m for m in self.measurements if m.name != new.name)
        return Stored((*kept, new), self.uniform, self.uniform_text)


def read_stored(reader: CheckpointReader) -> Stored:
    """What is kept beside the checkpoint; nothing where there is no file. Raises ElastiqError for a broken file and
    for one of another checkpoint."""
    path = reader.path / SENSITIVITY
    if not path.exists():
        return Stored()
    data = read_json(path)
    try:
        if data["format_version"] != _VERSION:
            raise ElastiqError(f"{path}: format version {data['format_version']!r} is not {_VERSION}; measure again")
        if data["checkpoint"] != _identity(reader):
            raise ElastiqError(f"{path}: it was measured on another checkpoint; remove it and measure again")
        uniform = {int(level): _damage(cell) for level, cell in data["uniform"]["levels"].items()}
        measurements = tuple(_measurement(row, reader) for row in data["measurements"])
        return Stored(measurements, uniform, data["uniform"]["text"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ElastiqError(f"{path}: not a table of sensitivities; remove it and measure again") from None


def write_stored(reader: CheckpointReader, stored: Stored) -> None:
    """Keep it beside the checkpoint: all of it or, after a crash, what was there before."""
    data = {
        "format_version": _VERSION,
        "checkpoint": _identity(reader),
        "uniform": {
            "text": stored.uniform_text,
            "levels": {str(level): {"kl": d.kl, "nll": d.nll} for level, d in stored.uniform.items()},
        },
        "measurements": [
            {
                "method": dict(m.method),
                "text": m.text,
                "seconds": m.seconds,
                "groups": [
                    {"matrices": list(names), "losses": {str(level): loss for level, loss in losses.items()}}
                    for names, losses in m.groups
                ],
                "cuts": {name: cut.to_dict() for name, cut in m.cuts.items()},
            }
            for m in stored.measurements
        ],
    }
    content = json_bytes(data, SENSITIVITY)
    replace_durably(reader.path / SENSITIVITY, lambda temporary: write_durably(temporary, [content]))


def losses(reader: CheckpointReader, table: Table, stored: Stored, name: str | None) -> tuple[Measurement, Floats]:
    """The measurement called `name` (None: the preferred one there is) and its losses [groups, levels].

    Raises ElastiqError where it was not measured, or for groups that do not fit into the table's.
    """
    measurement = _pick(reader, stored, name)
    places: dict[str, list[int]] = {}
    for index, group in enumerate(table.groups):
        for matrix in group:
            places.setdefault(matrix, []).append(index)
    result = np.zeros((len(table.groups), len(table.levels)))
    measured: set[str] = set()
    for matrices, values in measurement.groups:
        inside = sorted({index for matrix in matrices for index in places[matrix]})
        if len(inside) > 1 and any(table.members[index] is None for index in inside):
            raise ElastiqError(
                f"sensitivity {measurement.name}: {', '.join(matrices)} were measured together; "
                "measure again with --untie, or allocate without it"
            )
        try:
            result[inside] += table.shares(inside) * np.array([values[level] for level in table.levels])
        except KeyError as level:
            raise ElastiqError(
                f"sensitivity {measurement.name}: {matrices[0]} has no loss at {level} bits; measure again"
            ) from None
        measured.update(matrices)
    if missing := sorted(places.keys() - measured):
        raise ElastiqError(f"sensitivity {measurement.name}: nothing is known of {missing[0]}; measure again")
    return measurement, np.maximum.accumulate(result[:, ::-1], axis=1)[:, ::-1]


def cuts(reader: CheckpointReader, stored: Stored, untie: bool, rows: bool) -> dict[str, Cut]:
    """The matrices that are allocated in parts: fused experts with `untie` or `rows`, all others with `rows`.

    Raises ElastiqError where rows are asked for and no measurement tells them apart.
    """
    found = expert_cuts(reader) if untie or rows else {}
    by_rows = next((m.cuts for m in reversed(stored.measurements) if m.cuts), None)
    if rows and by_rows is None:
        raise ElastiqError(
            f"{reader.path}: nothing is known of rows; run elastiq sensitivity {reader.path} --method sampled-fisher "
            "--text FILE"
        )
    return found | {name: cut for name, cut in (by_rows or {}).items() if rows or name in found}


def free_sensitivities() -> list[str]:
    """Names of those that the level table is enough for."""
    return sorted(name for name, step in Step.registry["sensitivity"].items() if step.needs <= {"errors"})


def table_evidence(reader: CheckpointReader, step: Sensitivity) -> dict[str, Evidence]:
    """What the level table says about each matrix; experts of one tensor add up. Raises ElastiqError where `step` needs
    an error that is not known."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in reader.table:
        rows.setdefault(row["tensor"], []).append(row)
    all_known = all(known(row.get("energy")) for row in reader.table if row["block"] >= 0)
    result = {}
    for name, members in rows.items():
        energies = [float(row["energy"]) if all_known and known(row.get("energy")) else 1.0 for row in members]
        evidence = Evidence(levels=reader.levels, energy=sum(energies))
        if "errors" in step.needs:
            evidence = replace(evidence, errors=_errors(reader, step, name, members, energies))
        result[name] = evidence
    return result


def _errors(
    reader: CheckpointReader, step: Sensitivity, name: str, rows: list[dict[str, Any]], energies: list[float]
) -> dict[int, float]:
    """Relative output error of a matrix, or of all experts of a tensor, at every level."""
    errors = {}
    for level in reader.levels:
        cells = [row["levels"].get(str(level), {}).get("error") for row in rows]
        if not all(map(known, cells)):
            raise ElastiqError(
                f"sensitivity {step.name}: levels.json has no output error of {name} at {level} bits (tuned scales "
                f"change it); run elastiq sensitivity {reader.path} --text FILE, whose losses are then used"
            )
        errors[level] = sum(e * float(c) for e, c in zip(energies, cells, strict=True)) / (sum(energies) or 1.0)
    return errors


def _pick(reader: CheckpointReader, stored: Stored, name: str | None) -> Measurement:
    free = free_sensitivities()
    if name is None:
        name = next(n for n in PREFERRED if n in free or stored.named(n))
    if found := stored.named(name):
        return found
    if name not in Step.registry["sensitivity"]:
        known = ", ".join(sorted(Step.registry["sensitivity"]))
        raise ElastiqError(f"sensitivity {name!r} does not exist; known: {known}")
    if name not in free:
        raise ElastiqError(
            f"{reader.path}: {name} was not measured; run elastiq sensitivity {reader.path} --method {name} --text FILE"
        )
    step = cast(Sensitivity, step_from_dict("sensitivity", {"name": name}))
    groups = tuple(((matrix,), step.measure(evidence)) for matrix, evidence in table_evidence(reader, step).items())
    return Measurement(step.to_dict(), groups, None, 0.0)


def _measurement(row: Any, reader: CheckpointReader) -> Measurement:
    groups = []
    for group in row["groups"]:
        names = tuple(group["matrices"])
        if not names or not set(names) <= reader.manifest.matrices.keys():
            raise ValueError("a matrix that is not in the checkpoint")
        groups.append((names, {int(level): _number(loss) for level, loss in group["losses"].items()}))
    if not isinstance(row["method"]["name"], str):
        raise ValueError("a method without a name")
    cuts = {
        name: Cut.from_dict(cut, reader.manifest.matrices[name], len(reader.levels))
        for name, cut in row.get("cuts", {}).items()
    }
    return Measurement(row["method"], tuple(groups), row["text"], float(row["seconds"]), cuts)


def _damage(cell: Any) -> Damage:
    return Damage(_number(cell["kl"]), float(cell["nll"]))


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < _MOST:
        raise ValueError("a loss that is none")
    return float(value)


def _identity(reader: CheckpointReader) -> str:
    return reader.digests[LEVELS]
