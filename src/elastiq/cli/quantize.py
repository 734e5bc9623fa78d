"""quantize, inspect: from a model to a checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipes
from ..foreign.exporting import TARGETS
from ..measure.inspection import inspect_checkpoint, inspect_model
from ..pipeline.planning import plan
from ..pipeline.run import quantize
from .app import app
from .options import DTYPES, Bos, Device, Format, Json, Model, Precision, Revision, usable_device, widths, write
from .progress import Bars
from .rehearsal import rehearse
from .tables import (
    comma,
    show_checkpoint,
    show_estimate,
    show_inspection,
    show_plan,
    show_rehearsal,
    show_summary,
)


class Scales(StrEnum):
    half = "half"
    int6 = "int6"
    e4m3_row = "e4m3-row"


class Inputs(StrEnum):
    full = "full"
    quantized = "quantized"


@app.command("quantize")
def quantize_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the checkpoint.", show_default=False)],
    recipe: Annotated[
        str,
        typer.Option(
            help=f"One of {comma(recipes.names())}; `elastiq recipes` tells what they are, "
            "`elastiq recipes NAME` prints one as JSON. Or such a JSON file."
        ),
    ] = "nested",
    levels: Annotated[
        str | None,
        typer.Option(help="Widths that get scales of their own. (default: the recipe's, 2,3,4,6,8 for nested)"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Input channels per scale; -1 is the whole row. (default: the recipe's, 64 for nested)"),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric", help="Range is +-max; no zero points.", show_default=False)
    ] = None,
    scales: Annotated[
        Scales | None,
        typer.Option(help="How scales and zero points are stored; int6 takes half the bits.", show_default=False),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate",
            help="A random Hadamard rotation before every matrix: better below 4 bits, for elastiq's runtime alone.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize embeddings and output head too.")] = False,
    inputs: Annotated[
        Inputs, typer.Option(help="Calibrate each block on the full or the quantized model's activations.")
    ] = Inputs.full,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text or JSONL file; may be repeated. (default: a text in the package)", show_default=False),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens per calibration window.", min=2)] = 512,
    tuning_text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text or JSONL file that a tuner trains on; several share equally. "
            "(default: the calibration's and the package's)",
            show_default=False,
        ),
    ] = None,
    bos: Bos = True,
    device: Device = "cpu",
    dtype: Annotated[
        Precision | None, typer.Option(help="Arithmetic of the forward passes.", show_default=False)
    ] = None,
    revision: Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    rehearsal: Annotated[
        bool,
        typer.Option("--rehearse", help="Try the whole way with plain rounding in minutes, and keep nothing of it."),
    ] = False,
    to: Annotated[
        list[Format] | None, typer.Option(help="--rehearse: export to this as well; may be repeated.")
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Start over: drop an unfinished run, or a checkpoint and what was measured."),
    ] = False,
    json: Json = None,
) -> None:
    """Quantize MODEL once into the nested checkpoint OUTPUT. Interrupted, the same command resumes."""
    if to and not rehearsal:
        raise typer.BadParameter("--to belongs to --rehearse; a finished checkpoint goes through elastiq export")
    asked: dict[str, Any] = {
        "levels": None if levels is None else widths("--levels", levels),
        "group_size": group_size,
        "symmetric": symmetric,
        "scales": None if scales is None else scales.value,
        "rotate": rotate,
        "embeddings": embeddings or None,
        "inputs": None if inputs is Inputs.full else inputs.value,
    }
    given = {option: value for option, value in asked.items() if value is not None}
    if recipe.endswith(".json"):
        if given:
            options = comma(f"--{option.replace('_', '-')}" for option in given)
            raise typer.BadParameter(f"{recipe} says this itself; leave out {options}", param_hint="--recipe")
        chosen = recipes.read(recipe)
    elif recipe in recipes.names():
        chosen = recipes.get(recipe, **given)
    else:
        known = comma(recipes.names())
        raise typer.BadParameter(f"{recipe!r} does not exist; known: {known}, or a .json file", param_hint="--recipe")
    if dry_run:
        planned = plan(model, chosen, num_samples=num_samples, seq_len=seq_len, revision=revision)
        write(json, planned.to_dict())
        show_plan(planned)
        return
    if rehearsal:
        targets = [TARGETS[format.value]() for format in to or ()]
        with Bars() as progress:
            rehearsed = rehearse(
                model, output, chosen, targets, bos=bos, revision=revision, device=usable_device(device),
                progress=progress,
            )  # fmt: skip
        write(json, rehearsed.to_dict())
        show_rehearsal(rehearsed)
        if not rehearsed.passed:
            raise typer.Exit(1)
        return
    with Bars() as progress:
        summary = quantize(
            model,
            output,
            chosen,
            calibration or None,
            num_samples=num_samples,
            seq_len=seq_len,
            tuning=tuning_text or None,
            bos=bos,
            revision=revision,
            device=usable_device(device),
            dtype=None if dtype is None else DTYPES[dtype.value],
            restart=restart,
            progress=progress,
        )
    write(json, summary.to_dict())
    show_summary(summary, model)


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str, typer.Argument(help="Model directory, hub name, or a finished checkpoint.", show_default=False)
    ],
    activations: Annotated[bool, typer.Option(help="Run a few windows of text to find activation maxima.")] = True,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text for the activations. (default: a text in the package)", show_default=False),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Windows of text.", min=1)] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 128,
    bos: Bos = True,
    device: Device = "cpu",
    revision: Revision = None,
    json: Json = None,
) -> None:
    """Shapes, sizes, outliers, what will be quantized and what that takes."""
    if (Path(model) / "levels.json").is_file():
        result = inspect_checkpoint(model)
        write(json, result)
        show_checkpoint(result)
        return
    with Bars() as progress:
        result = inspect_model(
            model,
            activations=activations,
            calibration=calibration or None,
            num_samples=num_samples,
            seq_len=seq_len,
            bos=bos,
            device=usable_device(device),
            revision=revision,
            progress=progress,
        )
    planned = plan(model, revision=revision)
    write(json, {**result, "plan": planned.to_dict()})
    show_inspection(result)
    show_estimate(planned)
