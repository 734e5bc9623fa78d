"""The whole of it on a real model: quantize once, measure and answer at every width, report.

    python scripts/demo.py [--model DIRECTORY_OR_HUB_NAME]

Everything is written below demo/; what is finished there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import smollm2
from rich.console import Console
from rich.table import Table
from rich.text import Text

import elastiq
from elastiq import embedded
from elastiq.cli import Bars
from elastiq.linalg import native
from elastiq.tuners import ScaleTuning

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (2, 3, 4, 6, 8)
GROUP_SIZE = 64
EVALUATION_WINDOWS = 12
QUESTION = "Why is the sky blue?"
BEGINNING = "Return a list of the"

out = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model directory or a hub name instead of SmolLM2-135M-Instruct")
    begin = time.perf_counter()
    os.chdir(ROOT)
    model, name = choose_model(parser.parse_args().model)
    work = Path("demo") / name
    work.mkdir(parents=True, exist_ok=True)
    text = Path("demo/heldout.txt")
    text.write_text(embedded.heldout_text(), encoding="utf-8")
    checkpoint = work / "checkpoint"

    quantize(model, checkpoint)
    evaluation = evaluate(model, checkpoint, text, work / "evaluation.json")
    prompt = ["--raw", BEGINNING] if name == "embedded" else [QUESTION]
    answers = {level: answer(checkpoint, level, prompt, work / f"answer-{level}.txt") for level in LEVELS}
    report = work / "report.html"
    run("report", checkpoint, "--output", report)

    show(evaluation, prompt[-1], answers)
    out.print(f"\n{(time.perf_counter() - begin) / 60:.1f} minutes. The report: [bold]{report}[/]")


def choose_model(wanted: str | None) -> tuple[str, str]:
    """(directory or hub name, name of the demo's folder)."""
    if wanted:
        return wanted, Path(wanted).resolve().name
    try:
        return str(smollm2.model_dir(out.print).relative_to(ROOT)), smollm2.NAME
    except smollm2.Unavailable as error:
        out.print(Text(f"SmolLM2 cannot be had here ({error}); the small model inside the package takes its place."))
        return str(embedded.model_dir()), "embedded"


def quantize(model: str, checkpoint: Path) -> None:
    """With less of everything than the default, so that the demo ends within minutes."""
    quick = {"avx512": (16, 1, 1, 40), "torch": (8, 0, 0, 4)}
    windows, passes, refines, steps = quick.get(native.columns_path(), (8, 1, 0, 8))
    tuner = ScaleTuning(steps=steps, widest=3)
    usual = ScaleTuning()
    out.print(
        f"\nTo be quick (path {native.columns_path()!r}): {windows} calibration windows of 512 tokens, the default is "
        "128;\n"
        f"solver sweeps {passes} over all levels, {refines} over the high ones, the default is 4 and 4;\n"
        f"{steps} tuning steps at 2 bits and fewer at 3, the default is {usual.steps}, and 4 bits too: worse numbers"
    )
    call = f"elastiq.recipes.nested_tuned({LEVELS}, {GROUP_SIZE}, {tuner}, passes={passes}, refines={refines})"
    call = f">>> elastiq.quantize({model!r}, {str(checkpoint)!r}, {call}, num_samples={windows})"
    out.print(Text(call, style="bold"))
    recipe = elastiq.recipes.nested_tuned(LEVELS, GROUP_SIZE, tuner, passes=passes, refines=refines)
    try:
        with Bars() as progress:
            summary = elastiq.quantize(model, checkpoint, recipe, num_samples=windows, progress=progress)
    except elastiq.ElastiqError as error:
        sys.exit(f"elastiq: error: {error}; to start the demo over, remove {checkpoint.parent}")
    if summary.already_finished:
        out.print("finished already")


def evaluate(model: str, checkpoint: Path, text: Path, result: Path) -> dict[str, Any]:
    """The JSON of `elastiq evaluate`, kept in `result`."""
    if not is_current(result, checkpoint):
        widths = ",".join(map(str, LEVELS))
        options = ["--bits", widths, "--text", text, "--against", model, "--num-windows", EVALUATION_WINDOWS]
        run("evaluate", checkpoint, *options, "--json", result)
    evaluation: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return evaluation


def answer(checkpoint: Path, level: int, prompt: list[str], result: Path) -> str:
    """What `elastiq generate` says at `level` bits, kept in `result`."""
    if not is_current(result, checkpoint):
        said = run("generate", checkpoint, "--bits", level, "--max-new-tokens", 40, *prompt, capture=True)
        result.write_text(said, encoding="utf-8")
    return result.read_text(encoding="utf-8").strip()


def is_current(result: Path, checkpoint: Path) -> bool:
    """Whether a result is there and younger than what it was made from."""
    sources = [checkpoint / "checksums.json", Path(__file__)]
    return result.is_file() and all(result.stat().st_mtime > source.stat().st_mtime for source in sources)


def run(*arguments: Any, capture: bool = False) -> str:
    """One command of the command line, shown first; what it prints, if it is captured. A failure ends the demo."""
    words = [str(argument) for argument in arguments]
    out.print(Text(f"\n$ {shlex.join(['elastiq', *words])}", style="bold"))
    said = ""
    with subprocess.Popen(
        [Path(sys.executable).with_name("elastiq"), *words], stdout=subprocess.PIPE if capture else None, text=True
    ) as process:
        for line in process.stdout or ():
            said += line
            out.print(Text(line.rstrip("\n")))
    if process.returncode:
        sys.exit(process.returncode)
    return said


def show(evaluation: dict[str, Any], prompt: str, answers: dict[int, str]) -> None:
    """The table of widths, and the answers."""
    table = Table(
        "bits", "bits per weight", "MB in memory", "MB on disk", "perplexity", "KL divergence", title="\nOne file"
    )
    for column in table.columns:
        column.justify = "right"
    for row in evaluation["levels"]:
        sizes = (f"{row[key] / 1e6:.1f}" for key in ("bytes_in_memory", "bytes_on_disk"))
        table.add_row(
            str(row["bits"]),
            f"{row['bits_per_weight']:.2f}",
            *sizes,
            f"{row['perplexity']:.2f}",
            f"{row['kl_mean']:.4f}",
        )
    full = evaluation["full"]
    table.add_row("16", "16.00", f"{full['bytes_in_memory'] / 1e6:.1f}", "", f"{full['perplexity']:.2f}", "0")
    out.print(table)
    out.print(Text(f"\n{prompt}", style="bold"))
    for level, said in answers.items():
        out.print(Text(f"{level} bits  {' '.join(said.split())}"))


if __name__ == "__main__":
    main()
