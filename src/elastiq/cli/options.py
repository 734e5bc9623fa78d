"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..checkpoint.files import check_named
from ..core import MAX_BITS, library_errors
from ..evaluate import write_json


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Format(StrEnum):
    gguf = "gguf"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    hf = "hf"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Checkpoint = Annotated[Path, typer.Argument(help="Directory that `elastiq quantize` made.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Model directory, or a hub name.", show_default=False)]


def writable(file: Path | None) -> Path | None:
    """Callback of an option that names a file to write: what cannot be written is refused before the work."""
    if file is not None:
        check_named(file)
    return file


Json = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the result to this file.", show_default=False, callback=writable),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)]
Device = Annotated[str, typer.Option(help="Any device torch has: cpu, cuda, mps, ...")]
Size = Annotated[
    str | None, typer.Option(help="What the model may take in memory, such as 1.2GB.", show_default=False)
]
Map = Annotated[Path | None, typer.Option("--map", help="Level map that allocate wrote.", show_default=False)]
SensitivityName = Annotated[
    str | None, typer.Option("--sensitivity", help="Stored losses to use. (default: the best)", show_default=False)
]
Untie = Annotated[
    bool, typer.Option("--untie", help="Let q, k and v, gate and up, and the experts of a layer differ.")
]
Rows = Annotated[
    bool, typer.Option("--rows", help="Let rows of a matrix differ too, as sampled-fisher tells them apart.")
]
Window = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
FewWindows = Annotated[int, typer.Option(help="Windows of the text.", min=1)]
Bos = Annotated[
    bool, typer.Option("--bos/--no-bos", help="Start every window of text as the model's tokenizer starts a text.")
]
Text = Annotated[Path, typer.Option("--text", help="Text file to measure on.", show_default=False)]


def widths(option: str, text: str) -> tuple[int, ...]:
    """`2,3,4` as ascending numbers."""
    try:
        widths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 2,3,4", param_hint=option) from None
    if widths[0] < 1 or widths[-1] > MAX_BITS:
        wrong = next(w for w in widths if not 1 <= w <= MAX_BITS)
        raise typer.BadParameter(f"{wrong} is not a width from 1 to {MAX_BITS}", param_hint=option)
    return tuple(widths)


def mean_widths(option: str, text: str) -> list[float]:
    """`2,3.37,4` as ascending numbers, whole ones as int."""
    try:
        widths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 2,3.37,4", param_hint=option) from None
    if wrong := [width for width in widths if not 1 <= width <= MAX_BITS]:
        raise typer.BadParameter(f"{wrong[0]:g} is not a width from 1 to {MAX_BITS}", param_hint=option)
    return [int(width) if width == int(width) else width for width in widths]


def usable_device(name: str) -> str:
    """The device if torch can use it here."""
    with library_errors(f"device {name!r} cannot be used", "use --device cpu"):
        torch.empty(1, device=name)
    return name


def write(file: Path | None, data: Any) -> None:
    if file is not None:
        write_json(file, data)
