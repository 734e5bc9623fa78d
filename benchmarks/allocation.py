"""Level maps of every sensitivity and allocator, measured end to end."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from scipy.stats import spearmanr

from elastiq.allocate import Budget, Table, allocate, read_stored
from elastiq.allocate.losses import losses
from elastiq.checkpoint import CheckpointReader
from elastiq.checkpoint.sizes import map_sizes
from elastiq.core import Allocator, Problem, Step, Width, step_from_dict
from elastiq.evaluate import write_json
from elastiq.linalg import lagrangian_bound
from elastiq.measure import Bench, measure_sensitivity
from elastiq.report.charts import Line, save_line_chart

GOAL = 0.5
"""A mixed map should do as well as a uniform one of so many bits more."""


def allocation(
    model: Annotated[Path, typer.Option(help="Directory of the 16-bit model, the reference.")],
    checkpoint: Annotated[Path, typer.Option(help="Nested checkpoint made from it.")],
    measured_on: Annotated[Path, typer.Option(help="Text on which sensitivities are measured.")],
    text: Annotated[Path, typer.Option(help="Text on which maps are evaluated.")],
    json_file: Annotated[Path, typer.Option("--json", help="Rows; those that are there are kept.")],
    bits: Annotated[str, typer.Option(help="Mean code widths.")] = "2.25,2.5,2.75,3,3.25,3.5,4,5",
    sensitivities: Annotated[str, typer.Option(help="Names, or all.")] = "all",
    allocators: Annotated[str, typer.Option(help="Names, or all.")] = "all",
    num_windows: Annotated[int, typer.Option(help="Windows of 512 tokens for maps.")] = 8,
    sensitivity_windows: Annotated[int, typer.Option(help="Windows of 512 tokens for sensitivities.")] = 4,
    rows_by: Annotated[str, typer.Option(help="Sensitivities whose maps are also made of rows, or none.")] = "none",
) -> None:
    """KL divergence from the 16-bit model and perplexity by mean width, for every sensitivity and allocator, beside
    uniform and random maps and maps of rows; how sensitivities rank against end-to-end damage, and what they took."""
    rows = Rows(json_file)
    for name in _names("sensitivity", sensitivities):
        measured = measure_sensitivity(checkpoint, name, measured_on, num_windows=sensitivity_windows)
        rows.add({"case": "sensitivity", "name": name, "seconds": measured.seconds, **_ranks(checkpoint, name)})
    bench = Bench(checkpoint, text, num_windows=num_windows, against=model)
    seen = Seen(bench, rows)
    reader = bench.reader
    for level in reader.levels:
        seen.measure({"case": "uniform", "bits": level}, dict.fromkeys(reader.manifest.matrices, level))
    budgets = [float(value) for value in bits.split(",")]
    for seed in range(3):
        for budget in budgets:
            seen.measure({"case": "random", "bits": budget, "seed": seed}, _random(reader, budget, seed))
    for allocator in _names("allocator", allocators):
        if allocator == "random":
            continue
        for name in _names("sensitivity", sensitivities):
            for budget in budgets:
                row = {"case": "mixed", "sensitivity": name, "allocator": allocator, "bits": budget}
                if not rows.has(row):
                    found = allocate(reader, Budget(bits=budget), sensitivity=name, allocator=allocator)
                    seen.measure(row | {"gap": found.gap}, found.level_map.widths)
    for name in [] if rows_by == "none" else rows_by.split(","):
        for budget in budgets:
            row = {"case": "rows", "sensitivity": name, "allocator": "integer-programme", "bits": budget}
            if not rows.has(row):
                found = allocate(reader, Budget(bits=budget), sensitivity=name, rows=True)
                seen.measure(row | {"gap": found.gap}, found.level_map.widths)
    show(rows.rows)


def allocation_picture(
    json_file: Annotated[Path, typer.Option("--json", help="Rows that `allocation` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the picture (.png, .svg).")],
    sensitivity: str = "kl",
    allocator: str = "integer-programme",
    peers: Annotated[Path | None, typer.Option(help="Rows of other programs, as peers/*.py write them.")] = None,
) -> None:
    """Measured KL divergence against counted bits per weight: uniform, random and one pair's maps, its maps of rows and
    other programs' maps of the same model."""
    rows = [row for row in json.loads(json_file.read_text())["rows"] if "kl" in row]
    flat = [row for row in rows if row["case"] == "uniform" and row["bits"] <= 6]
    pair = {"sensitivity": sensitivity, "allocator": allocator}
    chosen = [row for row in rows if pair.items() <= row.items()]
    lines = [
        _line("uniform", flat, 0, [str(row["bits"]) for row in flat]),
        _line("widths by matrix", [row for row in chosen if row["case"] == "mixed"], 1),
        _line("widths by row", [row for row in chosen if row["case"] == "rows"], 2),
        _line("random", [row for row in rows if row["case"] == "random" and row["seed"] == 0], 7),
    ]
    others = [] if peers is None else json.loads(peers.read_text())["rows"]
    for colour, peer in enumerate(dict.fromkeys(row["peer"] for row in others), start=3):
        points = [row | {"kl": row["kl_mean"]} for row in others if row["peer"] == peer]
        lines.append(_line(peer, points, colour))
    save_line_chart(output, lines, "bits per weight", "KL divergence, nats per token", (), log_y=True)


def allocation_speed(json_file: Annotated[Path | None, typer.Option("--json")] = None) -> None:
    """Seconds and proved gap of every allocator on 300 and 30,000 random items of 7 levels, at 3.37 mean bits."""
    rows = []
    for items in (300, 30000):
        problem = _random_problem(items)
        for name in _names("allocator", "all"):
            options = {"generations": 5} if name == "evolutionary" else {}
            step = cast(Allocator, step_from_dict("allocator", {"name": name, **options}))
            begin = time.perf_counter()
            solution = step.allocate(problem)
            seconds = time.perf_counter() - begin
            loss = problem.total_loss(solution.choices)
            bound = lagrangian_bound(problem.loss, problem.costs[0], float(problem.limits[0]))
            gap = loss / max(bound, solution.bound) - 1
            rows.append({"items": items, "allocator": name, "seconds": seconds, "gap": gap})
            print(f"{items:>6} {name:20} {seconds:7.3f} s, gap {gap:.2e}", flush=True)
    if json_file:
        write_json(json_file, {"rows": rows})


class Rows:
    """Rows of a JSON file, written after each; a row with the same description is not made twice."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.is_file() else []

    def has(self, row: Mapping[str, Any]) -> bool:
        return any(all(old.get(key) == value for key, value in row.items()) for old in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        keys = ("case", "name", "sensitivity", "allocator", "bits", "seed")
        same = {key: row.get(key) for key in keys}
        self.rows = [old for old in self.rows if {key: old.get(key) for key in keys} != same] + [row]
        write_json(self.file, {"rows": self.rows})


class Seen:
    """Measures maps; the same widths are measured once."""

    def __init__(self, bench: Bench, rows: Rows) -> None:
        self.bench, self.rows = bench, rows
        self.known = {row["map"]: row for row in rows.rows if "map" in row}

    def measure(self, row: dict[str, Any], widths: Mapping[str, Width]) -> None:
        if self.rows.has(row):
            return
        key = hashlib.sha256(json.dumps(dict(sorted(widths.items()))).encode()).hexdigest()[:16]
        old = self.known.get(key)
        begin = time.perf_counter()
        if old is None:
            damage = self.bench.damage(widths)
            nll = self.bench.reference[1] + damage.nll
            old = {"kl": damage.kl, "perplexity": math.exp(min(nll, 700.0))}
        sizes = map_sizes(self.bench.reader, widths)
        new = {**row, "map": key, "kl": old["kl"], "perplexity": old["perplexity"], **sizes}
        self.known[key] = new
        self.rows.add(new)
        name = " ".join(str(row[k]) for k in ("case", "sensitivity", "allocator", "seed") if k in row)
        seconds = time.perf_counter() - begin
        measured = f"KL {new['kl']:.4f}, perplexity {new['perplexity']:.2f} ({seconds:.1f} s)"
        print(f"{name:>48} {row['bits']:>5}: {measured}", flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """KL divergence by mean width: uniform and random beside every pair, and how often the goal is met."""
    flat = {row["bits"]: row["kl"] for row in rows if row["case"] == "uniform"}
    pairs: dict[tuple[str, str], dict[float, float]] = {}
    chance: dict[float, list[float]] = {}
    for row in rows:
        if row["case"] in ("mixed", "rows"):
            how = row["allocator"] if row["case"] == "mixed" else "rows"
            pairs.setdefault((row["sensitivity"], how), {})[row["bits"]] = row["kl"]
        elif row["case"] == "random":
            chance.setdefault(row["bits"], []).append(row["kl"])
    budgets = sorted(chance)
    print(" " * 40 + "".join(f"{b:>9g}" for b in budgets))
    line = [uniform_kl(flat, b) for b in budgets]
    print(f"{'uniform (between: straight in log KL)':40}" + "".join(f"{kl:9.4f}" for kl in line))
    print(f"{'random, mean of 3':40}" + "".join(f"{np.mean(chance[b]):9.4f}" for b in budgets))
    order = sorted(pairs, key=lambda pair: np.mean([np.log(pairs[pair].get(b, np.nan)) for b in budgets]))
    for pair in order:
        cells = pairs[pair]
        goal = sum(cells[b] <= uniform_kl(flat, b + GOAL) for b in cells)
        below = sum(cells[b] <= uniform_kl(flat, b) for b in cells)
        print(
            f"{' + '.join(pair):40}" + "".join(f"{cells.get(b, math.nan):9.4f}" for b in budgets)
            + f"   below uniform {below}/{len(cells)}, as good as {GOAL} bits more {goal}/{len(cells)}"
        )  # fmt: skip


def uniform_kl(flat: Mapping[float, float], bits: float) -> float:
    """KL divergence of uniform maps, on the straight line in log KL between two of them."""
    levels = sorted(flat)
    return float(np.exp(np.interp(bits, levels, [math.log(flat[level]) for level in levels])))


def _line(name: str, rows: list[dict[str, Any]], colour: int, labels: Sequence[str] = ()) -> Line:
    rows = sorted(rows, key=lambda row: row["bits_per_weight"])
    return Line(name, [r["bits_per_weight"] for r in rows], [r["kl"] for r in rows], labels, colour)


def _random_problem(items: int) -> Problem:
    """Losses that fall about as 4^-level with spread of e^2 between items, three sizes of matrices."""
    generator = np.random.default_rng(0)
    levels = tuple(range(2, 9))
    weights = generator.choice([1e5, 3e5, 7e5], items)
    noise = np.exp(generator.normal(0, 0.1, (items, 7)))
    scale = np.exp(generator.normal(0, 2, (items, 1))) * weights[:, None]
    loss = scale * noise * 4.0 ** -np.array(levels, dtype=float)
    loss = np.maximum.accumulate(loss[:, ::-1], axis=1)[:, ::-1]
    costs = weights[:, None] * np.array(levels, dtype=float)
    return Problem(levels, weights, loss, costs[None], np.array([np.floor(3.37 * weights.sum())]))


def _names(slot: str, wanted: str) -> list[str]:
    return sorted(Step.registry[slot]) if wanted == "all" else wanted.split(",")


def _ranks(checkpoint: Path, name: str) -> dict[str, float]:
    """Spearman's correlation with end-to-end KL divergence: over all groups and levels, and over groups at 3 bits."""
    reader = CheckpointReader(checkpoint)
    stored, table = read_stored(reader), Table.of(reader)
    if stored.named("kl") is None:
        return {}
    reference, own = (losses(reader, table, stored, each)[1][:, :-1] for each in ("kl", name))
    third = table.levels.index(3)
    return {
        "rank_all": float(spearmanr(reference.ravel(), own.ravel()).statistic),
        "rank_3_bits": float(spearmanr(reference[:, third], own[:, third]).statistic),
    }


def _random(reader: CheckpointReader, bits: float, seed: int) -> dict[str, Width]:
    """A random map within the budget, without a comparison to anything."""
    table = Table.of(reader)
    step = cast(Allocator, step_from_dict("allocator", {"name": "random", "seed": seed}))
    shape = (len(table.groups), len(table.levels))
    limit = np.array([Budget(bits=bits).limits(table)["bits"]])
    problem = Problem(table.levels, table.group_weights, np.zeros(shape), table.costs["bits"][None], limit)
    return table.widths(step.allocate(problem).choices)
