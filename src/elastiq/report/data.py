"""What the page shows, computed from the checkpoint's tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core import FUSED
from ..evaluate import kind, level_error, mean_error, short_kinds
from ..text import begins
from .charts import Line

_MAX_COLUMNS = 128
_SHADES = (
    (0xFF, 0xF7, 0xD6),
    (0xFD, 0xC9, 0x6B),
    (0xF0, 0x7F, 0x4F),
    (0xB5, 0x36, 0x5F),
    (0x4A, 0x14, 0x5E),
    (0x1B, 0x0A, 0x33),
)
"""Light is a small error, dark a large one."""
_LEAST_RANGE = 2.0
"""A map whose errors differ by less than this both ways from their middle is not stretched to the full colours."""


@dataclass(frozen=True)
class Cell:
    """One matrix (or the experts of one block) at one level."""

    colour: str
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Errors of one level: a row per kind of matrix, a column per block; colours run from `low` to `high`."""

    level: int
    mean: float
    low: float
    high: float
    kinds: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))


def heat_maps(table: Sequence[dict[str, Any]], levels: Sequence[int]) -> list[HeatMap]:
    """One map per level that has errors, each with colours of its own; experts of one tensor and block are averaged."""
    rows = [row for row in table if row["block"] >= 0]
    kinds = ordered(kind(row["name"]) for row in rows)
    maps = (_heat_map(rows, level, kinds, sorted({row["block"] for row in rows})) for level in levels)
    return [m for m in maps if m is not None]


def _heat_map(
    rows: Sequence[dict[str, Any]], level: int, kinds: Sequence[str], blocks: Sequence[int]
) -> HeatMap | None:
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if (error := level_error(row, level)) is not None and error > 0:
            groups.setdefault((kind(row["name"]), row["block"]), []).append(error)
    if not groups:
        return None
    means = [sum(group) / len(group) for group in groups.values()]
    low, high = min(means), max(means)
    middle = math.sqrt(low * high)
    low, high = min(low, middle / _LEAST_RANGE), max(high, middle * _LEAST_RANGE)
    names = short_kinds(kinds)
    cells = tuple(tuple(_cell(groups.get((k, b)), k, b, level, low, high) for b in blocks) for k in kinds)
    flat = [error for group in groups.values() for error in group]
    return HeatMap(level, sum(flat) / len(flat), low, high, tuple(names[k] for k in kinds), cells)


def gradient() -> str:
    """The colours from a small to a large error, for a stylesheet."""
    return ", ".join(_colour(i / 10) for i in range(11))


def _cell(errors: list[float] | None, kind: str, block: int, level: int, low: float, high: float) -> Cell | None:
    if not errors:
        return None
    mean = sum(errors) / len(errors)
    what = f"mean of {len(errors)} experts, " if len(errors) > 1 else ""
    position = math.log(mean / low) / math.log(high / low)
    return Cell(_colour(position), f"block {block}, {kind}, {level} bits: {what}error {mean:.3g}")


def _colour(position: float) -> str:
    """The shade at `position` between 0 and 1."""
    scaled = min(max(position, 0.0), 1.0) * (len(_SHADES) - 1)
    index = min(int(scaled), len(_SHADES) - 2)
    part = scaled - index
    mixed = (round(a + (b - a) * part) for a, b in zip(_SHADES[index], _SHADES[index + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


@dataclass(frozen=True)
class Hardest:
    """The matrices that lose most. levels: those that have errors (a tuned level has none). rows: name, shape, and an
    error, or None, for each of `levels`."""

    levels: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]


def hardest(table: Sequence[dict[str, Any]], levels: Sequence[int], count: int = 10) -> Hardest:
    """The `count` matrices with the largest error summed over levels in proportion to each level's mean."""
    means = {level: mean for level in levels if (mean := mean_error(table, level))}

    def weight(row: dict[str, Any]) -> float:
        return sum((level_error(row, level) or 0.0) / mean for level, mean in means.items())

    worst = sorted((row for row in table if means), key=weight, reverse=True)[:count]
    rows = (
        {"name": row["name"], "shape": row["shape"], "errors": [level_error(row, level) for level in means]}
        for row in worst
    )
    return Hardest(tuple(means), tuple(rows))


def activation_lines(table: Sequence[dict[str, Any]]) -> list[Line]:
    """Largest |input| per block, one curve per kind of matrix; kinds that read the same values share a curve."""
    curves: dict[tuple[tuple[int, float], ...], list[str]] = {}
    rows = [
        row
        for row in table
        if row["block"] >= 0 and isinstance(row.get("abs_max"), (int, float)) and row["abs_max"] > 0
    ]
    kinds = ordered(kind(row["name"]) for row in rows)
    names = short_kinds(kinds)
    for k in kinds:
        points: dict[int, float] = {}
        for row in rows:
            if kind(row["name"]) == k:
                points[row["block"]] = max(points.get(row["block"], 0.0), float(row["abs_max"]))
        curves.setdefault(tuple(sorted(points.items())), []).append(names[k])
    return [
        Line(", ".join(shared), [b for b, _ in curve], [v for _, v in curve], colour=i)
        for i, (curve, shared) in enumerate(curves.items())
    ]


@dataclass(frozen=True)
class Expert:
    """One expert of one block: the calibration tokens that reached it, and whether they were too few."""

    number: int
    tokens: int
    fallback: bool


def experts(table: Sequence[dict[str, Any]]) -> list[tuple[int, list[Expert]]]:
    """(block, its experts) for every block that has some."""
    found: dict[int, dict[int, Expert]] = {}
    for row in table:
        if row["role"] in FUSED:
            number = int(str(row["name"]).rsplit(".", 1)[-1])
            before = found.setdefault(row["block"], {}).get(number)
            fallback = bool(row.get("fallback")) or (before is not None and before.fallback)
            found[row["block"]][number] = Expert(number, int(row.get("tokens") or 0), fallback)
    return [(block, [each[n] for n in sorted(each)][:_MAX_COLUMNS]) for block, each in sorted(found.items())]


def evaluation_names(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """The text of each evaluation, with its windows, and how they begin, where one text was measured in several
    ways."""
    protocols = [evaluation["protocol"] for evaluation in evaluations]
    texts = [p["text"] for p in protocols]
    starts: dict[str, set[tuple[int, ...]]] = {text: set() for text in texts}
    for p in protocols:
        starts[p["text"]].add(tuple(p.get("beginning", ())))
    names = []
    for p in protocols:
        windows = f", {p['num_windows']} x {p['window']} tokens" if texts.count(p["text"]) > 1 else ""
        start = f", {begins(p.get('beginning', ()))}" if len(starts[p["text"]]) > 1 else ""
        names.append(f"{p['text']}{windows}{start}")
    return names


def quality_lines(evaluations: Sequence[dict[str, Any]], key: str) -> list[Line]:
    """`key` of every evaluation against counted bits per weight; the topmost curve's points carry their widths."""
    lines = []
    names = evaluation_names(evaluations)
    for index, evaluation in enumerate(evaluations):
        rows = [r for r in evaluation["levels"] if isinstance(r.get(key), (int, float)) and r[key] > 0]
        if rows:
            labels = [f"{r['bits']:g}" for r in rows]
            x = [r["bits_per_weight"] for r in rows]
            lines.append(Line(names[index], x, [r[key] for r in rows], labels, colour=index))
    top = max(lines, key=lambda line: max(line.y), default=None)
    return [line if line is top else replace(line, labels=()) for line in lines]
