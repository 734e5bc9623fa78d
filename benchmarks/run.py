"""Benchmarks of elastiq: `python benchmarks/run.py CASE --json FILE`.

quality: one nested file against files made for each width alone, at every width, on a model and a text.
allocation: maps of every sensitivity and allocator against uniform and random ones, at every mean width;
allocation-picture draws its rows, allocation-speed times the allocators on large tables.
size: time and peak memory of quantizing one model, measured in a process of its own.
decode: tokens per second of whole models beside llama.cpp and transformers (decode.py).
matmul, matmul-paths, prefill: products with bit planes against a plain read of the same bytes, torch and ggml.
methods: every published method on one model at counted bits (methods.py).
activations: what fixed-point activations cost a whole model (activations.py).

Finished checkpoints are kept in --work and taken again, so an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import products
import typer
from activations import activations
from allocation import allocation, allocation_picture, allocation_speed
from decode import decode
from methods import methods

import elastiq
from elastiq.core import step_from_dict
from elastiq.evaluate import evaluate, write_json

app = typer.Typer(add_completion=False, no_args_is_help=True)
for command in (allocation, allocation_picture, allocation_speed, decode, activations, methods):
    app.command()(command)

Model = Annotated[Path, typer.Option(help="Directory of the 16-bit model.")]
Work = Annotated[Path, typer.Option(help="Where checkpoints are kept.")]
CASES = "nested,gptq-2,gptq-3,gptq-4"
Json = Annotated[Path | None, typer.Option("--json", help="Write the rows here.")]


@app.command()
def quality(
    model: Model,
    calibration: Annotated[Path, typer.Option(help="Calibration text.")],
    text: Annotated[list[Path], typer.Option(help="Evaluation texts.")],
    work: Work = Path("benchmarks/work"),
    levels: Annotated[str, typer.Option(help="Widths of the nested file.")] = "2,3,4,6,8",
    cases: Annotated[str, typer.Option(help="nested, or gptq-R / rtn-R made for R bits alone.")] = CASES,
    group_size: int = 64,
    num_samples: int = 32,
    num_windows: int = 24,
    token_weights: str = "block-output",
    json_file: Json = None,
) -> None:
    """One nested file, and files (with refit and coordinate descent) made for each width alone, at every width."""
    weights = step_from_dict("token-weights", {"name": token_weights})
    recipes: dict[str, elastiq.Recipe] = {}
    for case in cases.split(","):
        name, _, alone = case.partition("-")
        widths = tuple(int(level) for level in (alone or levels).split(","))
        recipes[case] = elastiq.recipes.get(name, levels=widths, group_size=group_size, token_weights=weights)
    rows = []
    for name, recipe in recipes.items():
        output = work / f"{model.name}-{name}-g{group_size}-{token_weights}"
        summary = elastiq.quantize(model, output, recipe, calibration, num_samples=num_samples)
        for path in text:
            result = evaluate(output, recipe.levels, path, against=str(model), window=512, num_windows=num_windows)
            for level in result["levels"]:
                row = {"model": model.name, "case": name, "text": path.name, "full": result["full"]["perplexity"]}
                rows.append(row | level)
                print_row(rows[-1])
        print(f"{name}: {summary.seconds:.0f} s, peak {summary.peak_memory / 1e9:.2f} GB", flush=True)
    if json_file:
        write_json(json_file, {"rows": rows})


@app.command()
def size(
    model: Model,
    output: Annotated[Path, typer.Option(help="Checkpoint directory.")],
    arguments: Annotated[list[str], typer.Argument(help="Further arguments of `elastiq quantize`.")],
    json_file: Json = None,
) -> None:
    """Seconds and peak memory of `elastiq quantize MODEL -o OUTPUT ARGUMENTS`."""
    begin = time.perf_counter()
    command = [str(Path(sys.executable).with_name("elastiq")), "quantize", str(model), "-o", str(output), *arguments]
    status = subprocess.run(command, check=False).returncode
    row = {
        "model": model.name,
        "arguments": arguments,
        "status": status,
        "seconds": time.perf_counter() - begin,
        "peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    print(json.dumps(row, indent=1))
    if json_file:
        write_json(json_file, {"rows": [row]})
    raise typer.Exit(status)


GroupSize = Annotated[int, typer.Option(help="Inputs per scale.")]
Seconds = Annotated[float, typer.Option(help="Time for each figure.")]
Shape = Annotated[str, typer.Option(help="Rows x inputs of the matrix; several with commas.")]


@app.command()
def matmul(
    shape: Shape = "4096x4096,2048x5632,11008x4096", group_size: GroupSize = 128, seconds: Seconds = 1.0,
    json_file: Json = None,
) -> None:  # fmt: skip
    """One token, the default path, fixed point of 16 bits; peers: torch, and ggml where GGML names a llama.cpp."""
    print_products(products.matmul_rows(shapes_of(shape), group_size, seconds), json_file, products.absent_peers())


@app.command()
def matmul_paths(
    shape: Shape = "4096x4096", group_size: GroupSize = 128, seconds: Seconds = 0.5, json_file: Json = None
) -> None:
    """One token and four, every compiled path and activation mode."""
    print_products(products.path_rows(shapes_of(shape)[0], group_size, seconds), json_file)


@app.command()
def prefill(
    shape: Shape = "4096x4096", group_size: GroupSize = 128, seconds: Seconds = 1.0, json_file: Json = None
) -> None:
    """32, 128 and 512 tokens against torch's products with dense weights."""
    print_products(products.prefill_rows(shapes_of(shape)[0], group_size, seconds), json_file)


def shapes_of(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(rows), int(inputs)) for rows, _, inputs in (part.partition("x") for part in text.split(",")))


def print_products(
    rows: Iterator[dict[str, Any]], json_file: Path | None, absent: dict[str, str] | None = None
) -> None:
    for name, reason in (absent or {}).items():
        print(f"skipped: {name} ({reason})", flush=True)
    kept = []
    for row in rows:
        kept.append(row)
        facts = [f"{key} {row[key]}" for key in ("tokens", "dtype", "activations") if key in row]
        if "fraction_of_read" in row:
            facts.append(f"{row['fraction_of_read']:.2f} of a read")
        facts += [f"{value:.2f} x {name}" for name, value in row.get("ratio", {}).items()]
        print(
            f"{row['shape']:>10} {row['path']:>11} {row['bits']} bits {row['threads']} threads "
            f"{row['microseconds']:8.0f} us, {', '.join(facts)}",
            flush=True,
        )
    if json_file:
        write_json(json_file, {"rows": kept, "absent": absent or {}})


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['model']:>12} {row['case']:>8} {row['text']:>16} {row['bits']} bits ({row['bits_per_weight']:.2f}): "
        f"perplexity {row['perplexity']:.2f} (full {row['full']:.2f}), KL {row['kl_mean']:.4f}, "
        f"top-1 {row['top1_agreement']:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    app()
