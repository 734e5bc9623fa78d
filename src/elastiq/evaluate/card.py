"""The model card: README.md of a checkpoint, with the front matter that the hub reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import recipes
from ..checkpoint import CheckpointReader
from ..checkpoint.files import replace_durably, write_durably
from ..checkpoint.names import CARD, RECIPE
from ..checkpoint.sizes import full_bytes, level_sizes, megabytes
from ..core import ElastiqError
from .record import read_evaluations, read_tasks, row_key, row_name, row_order

log = logging.getLogger("elastiq")

_BEGIN, _END = "<!-- written by elastiq -->", "<!-- end of what elastiq writes -->"


def write_card(checkpoint: str | Path) -> Path:
    """Write README.md into a checkpoint, or bring the part of it up to date that elastiq wrote; the file.

    What stands outside of the two marks is the owner's and is left alone; so is a README.md without them.
    A checkpoint that cannot be written is left as it is, with a warning. Raises ElastiqError for what is no checkpoint.
    """
    reader = CheckpointReader(checkpoint)
    path = reader.path / CARD
    try:
        _refresh(reader, path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ElastiqError(
            f"{reader.path}: evaluation.json or tasks.json is not what elastiq writes; remove it"
        ) from None
    return path


def _refresh(reader: CheckpointReader, path: Path) -> None:
    old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    new = f"{_front_matter(reader)}\n\n{_BEGIN}\n{_body(reader)}{_END}\n"
    if old is not None:
        before, begin, rest = old.partition(_BEGIN)
        _, end, after = rest.partition(_END)
        new = f"{before}{_BEGIN}\n{_body(reader)}{_END}{after}" if begin and end else old
    if new != old:
        replace_durably(path, lambda temporary: write_durably(temporary, [new.encode()]))


def made_by(reader: CheckpointReader) -> str:
    """The command that made the checkpoint, as far as its files tell."""
    info, name = reader.info, reader.path.resolve().name
    words = [
        "elastiq quantize",
        str(info.get("base_model") or info.get("model", "MODEL")),
        "-o",
        name,
        "--recipe",
        *(recipes.words(reader.recipe) or [f"{name}/{RECIPE}"]),
    ]
    tuning = info.get("tuning")
    texts = {
        "--calibration": info.get("calibration"),
        "--tuning-text": tuning.get("texts") if isinstance(tuning, dict) else None,
    }
    for option, names in texts.items():
        words += [word for text in names for word in (option, str(text))] if isinstance(names, list) else []
    for option, key in (("--num-samples", "windows"), ("--seq-len", "seq_len")):
        words += [option, str(info[key])] if key in info else []
    words += ["--no-bos"] if info.get("bos") is False else []
    return " ".join(words)


def _front_matter(reader: CheckpointReader) -> str:
    base = reader.info.get("base_model")
    data = ModelCardData(
        library_name="elastiq",
        pipeline_tag="text-generation",
        base_model=base if isinstance(base, str) else None,
        base_model_relation="quantized" if isinstance(base, str) else None,
        tags=["elastiq", "quantized", reader.recipe.solver.name, *(f"{bits}-bit" for bits in reader.levels)],
    )
    return f"---\n{data.to_yaml()}\n---"


def _body(reader: CheckpointReader) -> str:
    base = _plain(reader.info.get("base_model") or reader.info.get("model", "a model"))
    available, recipe = reader.available, reader.recipe
    low = reader.levels[min(1, len(reader.levels) - 1)]
    steps = ", ".join(f"{step.slot} `{step.name}`" for step in recipe.steps)
    lines = [
        f"# {_plain(reader.path.resolve().name)}",
        "",
        f"`{base}`, quantized once and read at {_comma(available)} bits from the same files: {steps}, group size "
        f"{reader.manifest.group_size}.",
        "",
        *_widths(reader),
        "",
        "```python",
        "import elastiq",
        "",
        f'model = elastiq.load("DIRECTORY", bits={low})   # the directory that elastiq pull NAME --bits {low} wrote',
        "```",
        "",
        "Made by elastiq " + version("elastiq") + ":",
        "",
        "```",
        _plain(made_by(reader)),
        "```",
        "",
    ]
    return "\n".join(lines)


def _widths(reader: CheckpointReader) -> list[str]:
    """One table of all widths, what was measured beside what was counted, and how it was measured."""
    measured = read_evaluations(reader.path)
    most = reader.available[-1]
    sizes: dict[Any, dict[str, Any]] = {
        row_key(row): row for e in measured for row in e["levels"] if row["bits"] <= most
    }
    sizes |= {bits: {"bits": bits, **row} for bits, row in level_sizes(reader, reader.levels).items()}
    columns = ["bits", "bits per weight", "on disk", "in memory"]
    rows = {
        row_key(size): [
            row_name(size),
            f"{size['bits_per_weight']:.2f}",
            megabytes(size["bytes_on_disk"]),
            megabytes(size["bytes_in_memory"]),
        ]
        for size in sorted(sizes.values(), key=row_order)
    }
    rows["16"] = ["16", "16.00", "", megabytes(full_bytes(reader))]
    notes = []
    for number, evaluation in enumerate(measured, start=1):
        mark = f" ({number})" if len(measured) > 1 else ""
        columns += [f"perplexity{mark}", f"KL divergence{mark}"]
        by_key: dict[Any, dict[str, Any]] = {row_key(row): row for row in evaluation["levels"]} | {
            "16": {"perplexity": evaluation["full"]["perplexity"], "kl_mean": 0.0 if evaluation["against"] else None}
        }
        for key, cells in rows.items():
            row = by_key.get(key, {})
            cells += [_number(row.get("perplexity"), ".2f"), _number(row.get("kl_mean"), ".3g")]
        notes.append(f"{mark.strip()} {_plain(evaluation['protocol']['words'])}.".strip())
    return [*_table(columns, list(rows.values())), "", *notes, *_tasks(reader)]


def _tasks(reader: CheckpointReader) -> list[str]:
    """What lm-evaluation-harness said, where it was asked."""
    most = reader.available[-1]
    kept = [row for row in read_tasks(reader.path).values() if row["bits"] is None or row["bits"] <= most]
    found: dict[Any, dict[str, float]] = {}
    for row in sorted(kept, key=_task_order):
        values = found.setdefault("16" if row["bits"] is None else row_name(row), {})
        notes = ([f"{row['items']} items"] if row["items"] else []) + ([] if row.get("bos", True) else ["no BOS"])
        for metric, value in row["metrics"].items():
            if not metric.endswith("_stderr"):
                values[", ".join([f"{_plain(row['task'])} {metric}", *notes])] = value
    if not any(found.values()):
        return []
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    rows = [[name, *(_number(values.get(m), ".3f") for m in metrics)] for name, values in found.items()]
    return ["", "By lm-evaluation-harness:", "", *_table(["bits", *metrics], rows)]


def _task_order(row: dict[str, Any]) -> tuple[float, str]:
    """The 16-bit model comes last."""
    return (math.inf, "") if row["bits"] is None else row_order(row)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def _plain(text: object) -> str:
    """Names from outside as one line that is no markup."""
    return "".join(c if c.isprintable() and c not in "`|<>" else " " for c in str(text))


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _comma(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
