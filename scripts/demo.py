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

from elastiq import embedded
from elastiq.linalg import native

ROOT = Path(__file__).parent.parent
LEVELS = (2, 3, 4, 6, 8)
GROUP_SIZE = 64
QUESTION = "What is the capital of France?"
BEGINNING = "Return a list of"

out = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    windows = "16"
    arguments = ["--bits", ",".join(map(str, LEVELS)), "--text", str(text), "--against", model, "--num-windows", windows]
    once(work / "evaluation.json", checkpoint, "evaluate", str(checkpoint), *arguments)
    answers = {level: answer(work, checkpoint, level, raw=name == "embedded") for level in LEVELS}
    run("report", str(checkpoint), "--output", str(work / "report.html"))
    show(json.loads((work / "evaluation.json").read_text(encoding="utf-8")), answers)
    out.print(f"\n{model}: {(time.perf_counter() - begin) / 60:.1f} minutes, report: [bold]{work / 'report.html'}[/]")


def choose_model(wanted: str | None) -> tuple[str, str]:
    """(directory or hub name, name of the demo's folder)."""
    if wanted:
        return wanted, Path(wanted).name
    if not (smollm2.CACHE / "models" / smollm2.NAME).is_dir():
        out.print("Getting SmolLM2-135M-Instruct (98 MB, once)")
    try:
        return str(smollm2.model_dir().relative_to(ROOT)), smollm2.NAME
    except smollm2.Unavailable as error:
        out.print(f"SmolLM2 cannot be had here ({error}); the small model inside the package is used instead.")
        return str(embedded.model_dir()), "embedded"
