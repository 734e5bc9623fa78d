"""Every published method on one model: same calibration, same text, at counted bits."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

import elastiq
from elastiq import Recipe, recipes
from elastiq.evaluate import evaluate, write_json
from elastiq.formats import Integer

WIDTHS = (2, 3, 4, 8)
Row = dict[str, Any]


def cases() -> Iterator[tuple[str, Recipe]]:
    """Name and recipe of every row, or of several where one file gives several widths."""
    yield "nested", recipes.nested()
    yield "nested-int6", recipes.nested(scales="int6")
    yield "nested-rotated", recipes.get("nested", rotate=True)
    yield "nested-tuned", recipes.nested_tuned()
    yield "nested-tuned-int6", recipes.nested_tuned(scales="int6")
    yield "nested-tuned-rotated", recipes.get("nested-tuned", rotate=True)
    yield "nested-tuned-blocks", recipes.nested_tuned_blocks()
    yield "matquant", recipes.matquant(WIDTHS)
    for bits in WIDTHS:
        yield f"rtn-{bits}", recipes.rtn((bits,))
        yield f"gptq-{bits}", recipes.gptq((bits,), refits=0, passes=0)
        yield f"gptq-descent-{bits}", recipes.gptq((bits,))
        yield f"awq-{bits}", recipes.awq((bits,))
        yield f"quarot-{bits}", recipes.quarot((bits,))
        yield f"spqr-{bits}", recipes.spqr((bits,))
    yield "spqr-3-int6", recipes.spqr((3,), scales="int6")
    for bits in (2, 3):
        yield f"auto-round-{bits}", recipes.auto_round((bits,))
        yield f"gsq-{bits}", recipes.gsq((bits,))
    for bits in (2, 3, 4):
        yield f"decoupleq-{bits}", recipes.decoupleq((bits,))
        yield f"lorc-{bits}", recipes.lorc((bits,))
        yield f"bias-{bits}", recipes.bias((bits,))
        yield f"hqq-{bits}", recipes.hqq((bits,))
        yield f"rsq-{bits}", recipes.rsq((bits,))
        yield f"quarot-stream-{bits}", recipes.quarot_stream((bits,))
    yield "bitstack", recipes.bitstack()
    yield "any-precision", recipes.any_precision((2, 3, 4, 5, 6, 7, 8))
    yield "pb-llm", recipes.pb_llm()
    yield "llm-int8", recipes.llm_int8()
    yield "smoothquant-8", recipes.smoothquant()
    yield "rtn-8-rows", Recipe(Integer((8,), -1, symmetric=True), recipes.rtn().solver)
    yield "rtn-4-rows", Recipe(Integer((4,), -1), recipes.rtn().solver)
    yield "nf4", recipes.nf4()
    yield "fp4", recipes.nf4("fp4")
    for number in ("e4m3fn", "e5m2ieee", "e3m4", "e2m3", "e3m2"):
        yield f"float-{number}", recipes.fp8(number)
    for number in ("e4m3fn", "e2m3", "e2m1", "int8", "int4"):
        yield f"mx-{number}", recipes.mx(number)
    yield "mx-e2m1-up", recipes.mx("e2m1", round_up=True)
    for number in ("e2m1", "int4"):
        yield f"nv-{number}", recipes.nv(number)
        yield f"nv-{number}-rotated", recipes.get("nv", number=number, rotate=True)


def methods(
    model: Annotated[Path, typer.Option(help="Directory of the 16-bit model.")],
    calibration: Annotated[Path, typer.Option(help="Calibration text.")],
    text: Annotated[Path, typer.Option(help="Text on which models are evaluated.")],
    json_file: Annotated[Path, typer.Option("--json", help="Rows; those that are there are kept.")],
    only: Annotated[str, typer.Option(help="Names of cases, with commas.")] = "",
    num_samples: int = 32,
    num_windows: int = 16,
) -> None:
    """Perplexity, KL divergence, top-1 agreement, seconds and peak memory of every method. Stopped, it goes on."""
    rows: list[Row] = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    chosen = [case for case in cases() if not only or case[0] in only.split(",")]
    done = {row["case"] for row in rows if row["model"] == model.name}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone:  # for a peak memory of its own
        for name, recipe in chosen:
            if name in done:
                continue
            found = alone.submit(measure, recipe.to_dict(), model, calibration, text, num_samples, num_windows).result()
            rows += [{"model": model.name, "text": text.name, "case": name, **row} for row in found]
            write_json(json_file, {"rows": rows})
    print(table([row for row in rows if row["model"] == model.name]))


def measure(
    recipe: dict[str, Any], model: Path, calibration: Path, text: Path, num_samples: int, num_windows: int
) -> list[Row]:
    """A row for every width of WIDTHS that the recipe's levels hold, or for its only one."""
    folder = Path(tempfile.mkdtemp())
    try:
        chosen = Recipe.from_dict(recipe)
        summary = elastiq.quantize(
            model, folder / "out", chosen, calibration, num_samples=num_samples, tuning=calibration
        )
        levels = [r for r in chosen.levels if len(chosen.levels) == 1 or r in WIDTHS]
        result = evaluate(folder / "out", levels, text, against=str(model), num_windows=num_windows)
    finally:
        shutil.rmtree(folder)
    return [
        {
            "bits": row["bits"],
            "bits_per_weight": row["bits_per_weight"],
            "perplexity": row["perplexity"],
            "kl": row["kl_mean"],
            "top1": row["top1_agreement"],
            "full": result["full"]["perplexity"],
            "seconds": summary.seconds,
            "peak_memory": summary.peak_memory,
        }
        for row in result["levels"]
    ]


def table(rows: list[Row]) -> str:
    """Markdown, by width and KL divergence."""
    lines = ["| method | width | bits per weight | perplexity | KL | top-1 | seconds | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["bits"], row["kl"])):
        scores = f"{row['perplexity']:.2f} | {row['kl']:.5f} | {row['top1']:.3f}"
        cost = f"{row['seconds']:.0f} | {row['peak_memory'] // 2**20}"
        lines.append(f"| {row['case']} | {row['bits']} | {row['bits_per_weight']:.2f} | {scores} | {cost} |")
    return "\n".join(lines)
