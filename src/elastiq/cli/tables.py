"""Results as tables on a terminal, or as plain aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..allocate import Allocation, Frontier, Measurement
from ..core import width_counts
from ..evaluate import kind, mean_error, megabytes, row_name, short_kinds
from ..foreign.exporting import ExportSummary
from ..pipeline.planning import Plan
from ..pipeline.run import Summary
from ..text import begins
from .rehearsal import Rehearsal

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)

Kinds = dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]]


def printable(text: str) -> str:
    """Names from a model directory cannot steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> None:
    """A table for people on a terminal, aligned plain text elsewhere. The first `left` columns are names."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if out.is_terminal:
        table = Table(
            title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, header_style="bold"
        )
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        out.print(table, soft_wrap=False)
        return
    if title:
        out.print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [list(columns), *cells]:
        sides = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        out.print("  ".join(sides).rstrip())


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _perplexity(value: float | None) -> str:
    return _number(value, ".2f" if value is None or value < 1e5 else ".2e")


def comma(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def show_summary(summary: Summary, model: str) -> None:
    if summary.already_finished:
        out.print(
            f"{summary.output} is finished already, made from the same model, recipe and calibration; nothing to do"
        )
    rows = []
    for level, row in summary.levels.items():
        sizes = [megabytes(int(row["bytes_in_memory"])), megabytes(int(row["bytes_on_disk"]))]
        tuned = summary.tuning.get(str(level))
        losses = [_number(tuned[when] if tuned else None, ".3g") for when in ("before", "after") if summary.tuning]
        rows.append([str(level), f"{row['bits_per_weight']:.2f}", *sizes, _number(row["error"], ".3g"), *losses])
    columns = ["KL before tuning", "after"] if summary.tuning else []
    _table(["bits", "bits per weight", "memory", "disk", "mean error", *columns], rows)
    if summary.already_finished:
        return
    resumed = f", {summary.resumed_blocks} parts kept from an earlier run" if summary.resumed_blocks else ""
    rounded = f", {len(summary.fallbacks)} rounded to nearest for want of tokens" if summary.fallbacks else ""
    out.print(
        f"{summary.matrices} matrices{rounded}, {summary.windows} calibration windows{resumed}; "
        f"{_duration(summary.seconds)}, peak memory {megabytes(summary.peak_memory)}"
    )
    if out.is_terminal:
        widths = ",".join(map(str, summary.levels))
        out.print(
            f"\nnext: elastiq evaluate {summary.output} --bits {widths} --text FILE.txt --against {model}", style="dim"
        )


def show_export(summary: ExportSummary) -> None:
    worst = summary.worst
    size = megabytes(summary.num_bytes)
    out.print(f"{printable(summary.output)}: {size}, {summary.bits_per_weight:.2f} bits per weight")
    out.print(
        f"error the format adds: {summary.error:.2g} on average, {worst['error']:.2g} at most "
        f"({worst['name']}, {worst['bits']} bits as {worst['stored_as']})"
    )
    out.print(f"logits differ by {summary.logits:.2%} from those of the checkpoint at the same widths")


def show_rehearsal(rehearsal: Rehearsal) -> None:
    rows = [
        [row.what, "passed" if row.passed else "failed", _duration(row.seconds), row.detail] for row in rehearsal.rows
    ]
    _table(["step", "", "took", "what came of it"], rows, left=4)
    verdict = "a real run will go through" if rehearsal.passed else "a real run would fail"
    out.print(f"{printable(rehearsal.model)}: {verdict}; nothing was kept")


def show_methods(recipes: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    out.print(f"recipes: {', '.join(recipes)}")
    cells = [
        [r["slot"], r["name"], r["bits"], ", ".join(r["needs"]) or "nothing", "; ".join(r["paper"])] for r in rows
    ]
    _table(["slot", "name", "bits", "needs", "papers"], cells, left=5)


def show_plan(planned: Plan) -> None:
    kinds = _by_kind(planned.matrices)
    rows = [
        [name, f"{shape[0]} x {shape[1]}", str(len(members)), f"{len(members) * shape[0] * shape[1]:,}"]
        for (name, shape), members in kinds.items()
    ]
    _table(["matrix", "shape", "count", "weights"], rows, "to be quantized")
    _show_skipped(planned.skipped)
    show_estimate(planned)


def show_estimate(planned: Plan) -> None:
    rows = [
        [
            str(level),
            f"{row['bits_per_weight']:.2f}",
            megabytes(int(row["bytes_in_memory"])),
            megabytes(int(row["bytes_on_disk"])),
        ]
        for level, row in planned.levels.items()
    ]
    rows.append(["16", "16.00", megabytes(planned.bytes_full), megabytes(planned.bytes_full)])
    _table(["bits", "bits per weight", "memory", "disk"], rows, "sizes")
    if planned.beside:
        out.print(f"what {', '.join(planned.beside)} store beside the codes comes on top")
    out.print(
        f"quantizing takes about {_duration(planned.seconds)}, {megabytes(planned.peak_memory)} of memory "
        f"and {megabytes(planned.disk)} of free disk (estimates)"
    )


def _show_skipped(skipped: dict[str, str]) -> None:
    reasons: dict[tuple[str, str], int] = {}
    for name, reason in skipped.items():
        reasons[kind(name), reason] = reasons.get((kind(name), reason), 0) + 1
    if reasons:
        _table(
            ["matrix", "reason", "count"], [[n, r, str(c)] for (n, r), c in reasons.items()], "stays in 16 bits", left=2
        )


def show_inspection(result: dict[str, Any]) -> None:
    out.print(
        printable(
            f"{result['model']}: {result['architecture']}, {result['parameters']:,} parameters in "
            f"{result['blocks']} blocks, {megabytes(result['bytes_on_disk'])} on disk"
        )
    )
    kinds = _by_kind(result["matrices"])
    rows = []
    for (name, shape), members in kinds.items():
        largest, peaked, far = (
            max(m[key] for m in members) for key in ("weight_abs_max", "weight_kurtosis", "weight_outliers")
        )
        cells = [
            f"{shape[0]} x {shape[1]}",
            str(len(members)),
            f"{2 * len(members) * shape[0] * shape[1] / 1e6:.1f} MB",
        ]
        rows.append([name, *cells, f"{largest:.3g}", f"{peaked:.1f}", f"{far:.3%}"])
    columns = ["matrix", "shape", "count", "16 bits", "max |w|", "kurtosis", "beyond 6 rms"]
    _table(columns, rows, "to be quantized (largest over the blocks)")
    _show_skipped(result["skipped"])
    out.print(printable(f"single tokens: {result['tokens']}"))
    if result["activations"] is not None:
        _show_activations(result)


def _show_activations(result: dict[str, Any]) -> None:
    """Largest |input| per block, with the number of outlier channels; matrices that read one input share a column."""
    readers: dict[str, list[str]] = {}
    for row in result["matrices"]:
        names = readers.setdefault(row["input_id"], [])
        if row["kind"] not in names:
            names.append(row["kind"])
    short = short_kinds(list(dict.fromkeys(row["kind"] for row in result["matrices"])))
    inputs: dict[str, dict[int, tuple[float, int]]] = {}
    for row in result["matrices"]:
        blocks = inputs.setdefault(", ".join(short[name] for name in readers[row["input_id"]]), {})
        if row["input_abs_max"] is not None:
            largest, channels = blocks.get(row["block"], (0.0, 0))
            blocks[row["block"]] = (max(largest, row["input_abs_max"]), max(channels, row["input_outlier_channels"]))
    rows = []
    for block in range(result["blocks"]):
        cells = [inputs[name].get(block) for name in inputs]
        rows.append([str(block), *("-" if c is None else f"{c[0]:.3g} ({c[1]})" for c in cells)])
    seen = result["activations"]
    title = (
        f"largest input (outlier channels), {seen['windows']} windows of {seen['window']} tokens, "
        f"{begins(seen['beginning'])}"
    )
    _table(["block", *inputs], rows, title)


def show_checkpoint(result: dict[str, Any]) -> None:
    recipe = result["recipe"]
    out.print(
        printable(
            f"{result['checkpoint']}: {result['model_type']}, {len(result['matrices'])} matrices, "
            f"{recipe['solver']['name']}, group size {recipe['format'].get('group_size')}, "
            f"levels {comma(result['levels'])}"
        )
    )
    rows = []
    for row in result["widths"]:
        sizes = [f"{row['bits_per_weight']:.2f}", megabytes(row["bytes_in_memory"]), megabytes(row["bytes_on_disk"])]
        rows.append([str(row["bits"]), *sizes, _number(row["error"], ".3g")])
    _table(["bits", "bits per weight", "memory", "disk", "mean error"], rows, "widths")
    kinds = _by_kind(result["matrices"])
    rows = []
    for (name, shape), members in kinds.items():
        errors = [_number(mean_error(members, level), ".2g") for level in result["levels"]]
        rows.append([name, " x ".join(map(str, shape)), str(len(members)), *errors])
    _table(["matrix", "shape", "count", *(f"{b} bits" for b in result["levels"])], rows, "mean error")
    out.print(printable(f"single tokens: {result['tokens']}"))


def _by_kind(rows: Iterable[dict[str, Any]]) -> Kinds:
    """Rows of matrices that are the same kind and shape in every block."""
    kinds: Kinds = {}
    for row in rows:
        kinds.setdefault((kind(row["name"]), tuple(row["shape"])), []).append(row)
    return kinds


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def show_allocation(found: Allocation) -> None:
    """The widths by kind of matrix and block, then what the whole map takes and loses."""
    widths = found.level_map.widths
    kinds: dict[str, list[dict[int, float]]] = {}
    for name, width in widths.items():
        count = len(width) if isinstance(width, str) else 1
        kinds.setdefault(kind(name), []).append({b: n / count for b, n in width_counts(width, count).items()})
    levels = sorted({level for members in kinds.values() for shares in members for level in shares})
    rows = []
    for name, members in kinds.items():
        counts = [sum(shares.get(level, 0.0) for shares in members) for level in levels]
        mean = sum(level * count for level, count in zip(levels, counts, strict=True)) / len(members)
        rows.append([name, *(f"{count:.1f}".removesuffix(".0") if count else "" for count in counts), f"{mean:.2f}"])
    _table(["matrix", *(f"{level} bits" for level in levels), "mean"], rows, "matrices at each width")
    out.print(
        f"\nmap {found.level_map.digest}: mean width {found.sizes['mean_bits']:.4f} bits, "
        f"{found.sizes['bits_per_weight']:.4f} bits per weight, "
        f"{megabytes(found.sizes['bytes_in_memory'])} in memory"
    )
    if "seconds_per_token" in found.sizes:
        out.print(f"{1e3 * found.sizes['seconds_per_token']:.2f} ms per token, from times measured on this machine")
    out.print(f"{found.allocator} on {found.sensitivity}: {_predicted(found.loss, found.kl)}, gap {found.gap:.3%}")
    if found.uniform is not None:
        flat = _predicted(found.uniform["loss"], found.uniform["kl"])
        out.print(f"uniform {found.uniform['bits']} bits, the widest within the budget: {flat}")
    for note in found.notes:
        out.print(printable(note))


def show_sensitivity(measured: Measurement) -> None:
    """Mean loss by kind of matrix, and where the most is lost."""
    levels = sorted(measured.groups[0][1])
    kinds: dict[str, list[Mapping[int, float]]] = {}
    for names, losses in measured.groups:
        kinds.setdefault(" + ".join(kind(name) for name in names), []).append(losses)
    rows = [
        [name, str(len(members)), *(f"{sum(m[level] for m in members) / len(members):.3g}" for level in levels)]
        for name, members in kinds.items()
    ]
    _table(["matrices", "count", *(f"{level} bits" for level in levels)], rows, f"mean loss by {measured.name}")
    worst = sorted(measured.groups, key=lambda group: -group[1][levels[0]])[:5]
    cells = [[" + ".join(names), *(f"{losses[level]:.3g}" for level in levels)] for names, losses in worst]
    _table(["matrices", *(f"{level} bits" for level in levels)], cells, "most sensitive")
    where = "from the level table" if measured.text is None else f"on {measured.text['name']}"
    out.print(printable(f"{measured.name} {where}, {_duration(measured.seconds)}"))


def show_frontier(curve: Frontier) -> None:
    """Uniform widths, each with what the best map of its size is predicted to lose."""
    steps = list(curve.steps)
    rows = []
    for level, row in curve.uniform.items():
        within = [step for step in steps if step.bits_per_weight <= row["bits_per_weight"] + 1e-12]
        best = [_number(getattr(within[-1], key), ".3g") for key in ("loss", "kl")] if within else ["", ""]
        flat = [_number(row[key], ".3g") for key in ("loss", "kl")]
        sizes = [f"{row['bits_per_weight']:.2f}", megabytes(row["bytes_in_memory"])]
        rows.append([str(level), *sizes, *flat, *best])
    columns = ["uniform bits", "bits per weight", "memory", "loss", "KL", "loss of the best map", "its KL"]
    _table(columns, rows, f"predicted by {curve.sensitivity}")
    out.print(f"{len(curve.steps)} steps from {_step_size(curve.sizes)} to {_step_size(asdict(steps[-1]))}")


def _step_size(sizes: Mapping[str, Any]) -> str:
    return f"{sizes['bits_per_weight']:.2f} bits per weight ({megabytes(sizes['bytes_in_memory'])})"


def _predicted(loss: float, kl: float | None) -> str:
    return f"predicted loss {loss:.4g}" + ("" if kl is None else f", KL divergence {kl:.3g}")


def show_tasks(result: dict[str, Any]) -> None:
    """One column per task and metric, standard errors beside the values."""
    rows = [(row_name(row), f"{row['bits_per_weight']:.2f}", row["tasks"]) for row in result["levels"]]
    rows += [("16", "16.00", result["full"]["tasks"])] if result["full"] else []
    metrics = {(task, m): None for *_, tasks in rows for task in tasks for m in tasks[task] if "_stderr" not in m}

    def cell(tasks: Mapping[str, Mapping[str, float]], task: str, metric: str) -> str:
        scatter = tasks[task].get(f"{metric}_stderr")
        value = _perplexity(tasks[task][metric]) if metric == "perplexity" else f"{tasks[task][metric]:.3f}"
        return value if scatter is None or metric == "perplexity" else f"{value} ±{scatter:.3f}"

    cells = [[bits, size, *(cell(tasks, *metric) for metric in metrics)] for bits, size, tasks in rows]
    _table(["bits", "bits per weight", *(f"{task} {metric}" for task, metric in metrics)], cells)
    protocol, limit = result["protocol"], result["protocol"]["limit"]
    items = "all items" if limit is None else f"at most {limit} items of each"
    items += "" if protocol.get("bos", True) else ", no special tokens"
    out.print(f"lm-evaluation-harness {protocol['harness']}, {items}; {protocol['dtype']} arithmetic")


def show_evaluation(result: dict[str, Any]) -> None:
    with_full = result["against"] is not None
    columns = ["bits", "bits per weight", "memory", "disk", "perplexity"]
    columns += ["KL mean", "KL 99%", "KL max", "top-1 agreement"] if with_full else []
    rows = []
    for row in result["levels"]:
        cells = [row_name(row), f"{row['bits_per_weight']:.2f}", megabytes(row["bytes_in_memory"])]
        cells += [megabytes(row["bytes_on_disk"]), _perplexity(row["perplexity"])]
        if with_full:
            cells += [_number(row[key], ".3g") for key in ("kl_mean", "kl_p99", "kl_max")]
            cells.append(_number(row["top1_agreement"], ".2%"))
        rows.append(cells)
    if with_full:
        full = [_perplexity(result["full"]["perplexity"]), "0", "0", "0", "100.00%"]
        rows.append(["16", "16.00", megabytes(result["full"]["bytes_in_memory"]), "", *full])
    _table(columns, rows)
    words = f"{result['protocol']['words']}; {result['protocol']['predicted_tokens']} predicted tokens"
    out.print(printable(f"{words}; single tokens: {result['tokens']}"))
