"""The page about one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointReader
from ..checkpoint.files import replace_file, write_named
from ..core import ElastiqError
from ..evaluate import (
    checkpoint_files,
    full_bytes,
    level_sizes,
    made_by,
    mean_error,
    megabytes,
    read_evaluations,
    row_key,
    row_name,
    row_order,
)
from .charts import line_chart, save_line_chart
from .data import (
    Line,
    activation_lines,
    evaluation_names,
    experts,
    gradient,
    hardest,
    heat_maps,
    quality_lines,
)

FILE = "report.html"
_BAR = 90
_LOG_FROM = 3.0
"""A ratio of largest to smallest perplexity from which a log axis shows more."""


def write_report(path: str | Path, output: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about the checkpoint `path`, by default `report.html` inside it.

    Its quality sections come from the evaluations kept beside the checkpoint; without any, the page says what to run.
    Raises ElastiqError if the checkpoint is damaged, the file cannot be written or a package is missing.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ElastiqError("report: jinja2 is not installed; run pip install 'elastiq[report]'") from None

    file = Path(output) if output is not None else Path(path) / FILE
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    view = _view(CheckpointReader(Path(path).resolve()))
    view["quality"] = [(title, Markup(svg), caption) for title, svg, caption in view["quality"]]
    view["activations"] = Markup(view["activations"]) if view["activations"] else None
    page = environment.get_template("template.html.j2").render(view)
    if output is None:
        replace_file(file, page.encode())
    else:
        write_named(file, page.encode())
    return file


def write_picture(path: str | Path, file: str | Path) -> Path:
    """Draw perplexity against counted bits per weight as a .png or .svg file.

    Raises ElastiqError if nothing has been evaluated.
    """
    evaluations = read_evaluations(path)[-3:]
    if not evaluations:
        raise ElastiqError(f"report: {path} has not been evaluated; run elastiq evaluate first")
    lines = quality_lines(evaluations, "perplexity")
    save_line_chart(Path(file), lines, "bits per weight", "perplexity", _references(evaluations), _wants_log(lines))
    return Path(file)


def _view(reader: CheckpointReader) -> dict[str, Any]:
    """Every value the template names."""
    table, levels = reader.table, reader.levels
    evaluations = read_evaluations(reader.path)[-4:]
    evaluation = _main(evaluations)
    maps = heat_maps(table, levels)
    blocks = sorted({row["block"] for row in table if row["block"] >= 0})
    expert_rows = experts(table)
    full = evaluation["full"]["perplexity"] if evaluation else None
    return {
        "name": reader.path.name,
        "lead": _lead(reader),
        "facts": _facts(reader),
        "widths": _widths(reader, evaluation),
        "evaluation": evaluation,
        "has_kl": any(row["kl_mean"] is not None for row in evaluation["levels"]) if evaluation else False,
        "full_perplexity": _perplexity(full) or None,
        "full_memory": megabytes(full_bytes(reader)),
        "best": _verdict(evaluation),
        "others": [_other(e) for e in reversed(evaluations) if e is not evaluation],
        "quality": _quality(evaluations),
        "heat_maps": maps,
        "gradient": gradient(),
        "label_width": max((len(k) for m in maps for k in m.kinds), default=0) + 2,
        "blocks": blocks,
        "block_step": max(1, -(-len(blocks) // 10)),
        "hardest": hardest(table, levels),
        "activations": _activations(table),
        "experts": expert_rows,
        "most_tokens": max((e.tokens for _, each in expert_rows for e in each), default=0) or 1,
        "fallbacks": sum(e.fallback for _, each in expert_rows for e in each),
        "files": _files(reader),
        "evaluate_command": f"elastiq evaluate {reader.path.name} --bits {_comma(levels)} "
        "--text FILE.txt --against MODEL",
        "use_shell": _use_shell(reader),
        "use_python": _use_python(reader),
        "reproduce": made_by(reader),
        "version": version("elastiq"),
    }


def _main(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The latest evaluation, one against the full model if there is any."""
    compared = [e for e in evaluations if e["against"] is not None] or evaluations
    return compared[-1] if compared else None


def _lead(reader: CheckpointReader) -> str:
    widths = _and(reader.available)
    if len(reader.available) == 1:
        return f"A language model quantized to {widths} bits."
    own = _and(reader.levels)
    return f"One quantized language model for {widths} bits in the same files; {own} bits have scales of their own."


def _facts(reader: CheckpointReader) -> list[tuple[str, str]]:
    recipe = reader.recipe.to_dict()
    shapes = reader.config.get("hidden_size"), reader.config.get("num_hidden_layers")
    facts = [
        ("architecture", str(reader.config.get("model_type", "unknown"))),
        ("blocks", shapes[1]),
        ("hidden size", shapes[0]),
        ("quantized weights", f"{sum(row['shape'][0] * row['shape'][1] for row in reader.table):,}"),
        ("matrices", f"{len(reader.table):,}"),
        ("method", recipe["solver"]["name"]),
        ("tuning", recipe["tuner"]["name"] if "tuner" in recipe else None),
        ("group size", recipe["format"].get("group_size")),
        ("embeddings", "quantized" if recipe["embeddings"] else "16 bits"),
    ]
    return [(label, str(value)) for label, value in facts if value is not None]


def _widths(reader: CheckpointReader, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row per width that has scales of its own, and per width or map that has been evaluated."""
    measured = {row_key(row): row for row in evaluation["levels"]} if evaluation else {}
    full = evaluation["full"]["perplexity"] if evaluation else None
    own = [bits for bits in reader.available if bits in reader.levels or bits in measured]
    sizes = {row_key(row): row for row in measured.values() if row["bits"] <= reader.available[-1]}
    sizes |= {bits: {"bits": bits, **size} for bits, size in level_sizes(reader, own).items()}
    largest = max(size["bytes_in_memory"] for size in sizes.values())
    rows = []
    for size in sorted(sizes.values(), key=row_order):
        row = measured.get(row_key(size), {})
        perplexity = row.get("perplexity")
        rows.append(
            {
                "bits": row_name(size),
                "bits_per_weight": size["bits_per_weight"],
                "memory": megabytes(size["bytes_in_memory"]),
                "bar": round(_BAR * size["bytes_in_memory"] / largest),
                "disk": megabytes(size["bytes_on_disk"]),
                "error": "" if "map" in size else _number(mean_error(reader.table, size["bits"]), ".2g"),
                "perplexity": _perplexity(perplexity),
                "change": f"{100 * (perplexity / full - 1):+.1f} %" if perplexity and full else "",
                "kl_mean": _number(row.get("kl_mean"), ".3g"),
                "kl_p99": _number(row.get("kl_p99"), ".3g"),
                "top1": _percent(row.get("top1_agreement")),
            }
        )
    return rows


def _other(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The compact table of an earlier evaluation: a column per width."""
    rows, full = evaluation["levels"], evaluation["full"]["perplexity"]
    lines = [("perplexity", [_perplexity(r["perplexity"]) for r in rows], _perplexity(full))]
    if any(r["kl_mean"] is not None for r in rows):
        lines.append(("KL mean", [_number(r["kl_mean"], ".3g") for r in rows], "0"))
        lines.append(("same first choice", [_percent(r["top1_agreement"]) for r in rows], "100 %"))
    return {"words": evaluation["protocol"]["words"], "widths": [row_name(r) for r in rows], "lines": lines}


def _verdict(evaluation: dict[str, Any] | None) -> str | None:
    """The narrowest width within 5% of the full model's perplexity, in a sentence."""
    full = evaluation["full"]["perplexity"] if evaluation is not None else None
    if evaluation is None or not full:
        return None
    good = [row for row in evaluation["levels"] if row["perplexity"] <= 1.05 * full]
    if not good:
        return None
    row = min(good, key=row_order)
    name, times = row_name(row), 16 / row["bits_per_weight"]
    return f"At {name} bits the matrices take {times:.1f} times less room and perplexity rises by less than 5 %."


def _quality(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(title, SVG, caption) of the pictures of quality against counted bits."""
    pictures = []
    lines = quality_lines(evaluations, "perplexity")
    if lines:
        log_y = _wants_log(lines)
        svg = line_chart(lines, "bits per weight", "perplexity", references=_references(evaluations), log_y=log_y)
        pictures.append(
            ("Perplexity", svg, "Numbers beside the points are widths; the dotted line is the 16-bit model.")
        )
    lines = quality_lines(evaluations, "kl_mean")
    if lines:
        tails = quality_lines(evaluations, "kl_p99")
        faint = (
            [Line("99 % stay below", t.x, t.y, colour=t.colour, faint=True) for t in tails[:1]]
            if len(lines) == 1
            else []
        )
        svg = line_chart([*lines, *faint], "bits per weight", "KL divergence, nats per token", log_y=True)
        pictures.append(
            (
                "Distance to the 16-bit model",
                svg,
                "Mean KL divergence of the predicted tokens; each step down is ten times closer.",
            )
        )
    return pictures


def _references(evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, float, int]]:
    names = evaluation_names(evaluations)
    return [
        (f"16 bits, {names[index]}" if len(names) > 1 else "16 bits", e["full"]["perplexity"], index)
        for index, e in enumerate(evaluations)
        if e["full"]["perplexity"]
    ]


def _wants_log(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for y in line.y]
    return max(values) > _LOG_FROM * min(values)


def _activations(table: Sequence[dict[str, Any]]) -> str | None:
    lines = activation_lines(table)
    if not lines:
        return None
    return line_chart(lines, "block", "largest absolute input", log_y=_wants_log(lines), whole_x=True, size=(10.4, 3.6))


def _files(reader: CheckpointReader) -> list[dict[str, Any]]:
    """Name, size and share of the largest, for every file of weights; the small ones in one row."""
    sizes = checkpoint_files(reader)
    shown = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    shown["tokenizer, tables"] = sum(sizes.values()) - sum(shown.values())
    largest = max(shown.values())
    return [
        {"name": name, "size": megabytes(size), "percent": round(max(100 * size / largest, 0.3), 1)}
        for name, size in shown.items()
    ]


def _use_shell(reader: CheckpointReader) -> str:
    bits = reader.levels[len(reader.levels) // 2]
    lines = [f'elastiq generate {reader.path.name} --bits {bits} "your prompt"']
    if len(reader.available) > 1:
        lines.append(f"elastiq slice {reader.path.name} --bits {bits} -o SMALLER")
    return "\n".join(lines)


def _use_python(reader: CheckpointReader) -> str:
    first, last = reader.available[0], reader.available[-1]
    low = reader.levels[min(1, len(reader.levels) - 1)]
    lines = [
        "import elastiq",
        f'model = elastiq.load("{reader.path.name}", bits={low}, max_bits={last})   # an ordinary transformers model',
    ]
    if first != last:
        lines.append(f"elastiq.set_bits(model, {last})   # live")
    return "\n".join(lines)


def _perplexity(value: float | None) -> str:
    return (
        "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.1e}"
    )


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _comma(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _and(values: Sequence[int]) -> str:
    words = list(map(str, values))
    if len(words) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{words[0]} to {words[-1]}"
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
