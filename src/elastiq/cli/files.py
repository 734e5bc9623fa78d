"""report, slice, push, pull, export, import: other files made of a checkpoint, or the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint import CheckpointReader, slice_checkpoint
from ..core import MAX_BITS
from ..evaluate import megabytes, write_card
from ..foreign.exporting import TARGETS, export
from ..foreign.importing import import_model
from ..integrations.hub import pull, push
from ..report import write_picture, write_report
from .app import app
from .options import Checkpoint, Format, Json, Map, Revision, writable, write
from .tables import comma, out, printable, show_export


@app.command("report")
def report_command(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A page, or a .png or .svg. (default: CHECKPOINT/report.html)",
            show_default=False,
            callback=writable,
        ),
    ] = None,
) -> None:
    """Write one HTML page with pictures about CHECKPOINT, or draw its perplexity against counted bits alone."""
    if output is not None and output.suffix in (".png", ".svg"):
        out.print(str(write_picture(checkpoint, output)))
    else:
        out.print(str(write_report(checkpoint, output)))


@app.command("slice")
def slice_command(
    checkpoint: Checkpoint,
    bits: Annotated[
        int, typer.Option(help="Widest width the smaller directory can give.", min=1, max=MAX_BITS, show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory.", show_default=False)],
) -> None:
    """Write a smaller directory that holds the first BITS planes of CHECKPOINT."""
    slice_checkpoint(checkpoint, bits, output)
    write_card(output)
    _show_directory(output)


@app.command("push")
def push_command(
    checkpoint: Checkpoint,
    repository: Annotated[str, typer.Argument(help="USER/NAME on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Hide the repository if it is made now.")] = False,
    revision: Revision = None,
) -> None:
    """Upload CHECKPOINT to the Hugging Face hub. Log in with `hf auth login` first."""
    out.print(printable(push(checkpoint, repository, private=private, revision=revision)))


@app.command("pull")
def pull_command(
    repository: Annotated[str, typer.Argument(help="USER/NAME on the hub.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory.", show_default=False)],
    bits: Annotated[
        int | None,
        typer.Option(help="Widest width to download. (default: all)", min=1, max=MAX_BITS, show_default=False),
    ] = None,
    revision: Revision = None,
) -> None:
    """Download a checkpoint from the Hugging Face hub, with no more planes than BITS needs."""
    pull(repository, output, bits, revision=revision)
    _show_directory(output)


def _show_directory(directory: Path) -> None:
    """Widths and size."""
    size = megabytes(sum(file.stat().st_size for file in directory.iterdir()))
    out.print(f"{printable(str(directory))}: {comma(CheckpointReader(directory).available)} bits, {size}")


@app.command("export")
def export_command(
    checkpoint: Checkpoint,
    to: Annotated[Format, typer.Option(help="Format of the other tool.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="New file (gguf) or directory.", show_default=False)],
    bits: Annotated[
        float | None,
        typer.Option(help="Width, or mean width. (default: the largest)", min=1, max=MAX_BITS, show_default=False),
    ] = None,
    level_map: Map = None,
    type: Annotated[
        str | None,
        typer.Option(help="gguf: type of all matrices, such as Q4_K. (default: by width)", show_default=False),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="compressed-tensors: keep zero points (4 and 8 bits).")
    ] = False,
    version: Annotated[int, typer.Option(help="gptq: 1 is read everywhere, 2 by newer readers.", min=1, max=2)] = 1,
    exact: Annotated[
        bool, typer.Option("--exact", help="Refuse where the format cannot hold the codes exactly.")
    ] = False,
    json: Json = None,
) -> None:
    """Write CHECKPOINT at one width, or at the widths of a map, for another tool."""
    if bits is not None and level_map is not None:
        raise typer.BadParameter("give one of --bits and --map")
    if type is not None and to is not Format.gguf:
        raise typer.BadParameter(f"--type belongs to --to gguf, not to {to.value}")
    if asymmetric and to is not Format.compressed_tensors:
        raise typer.BadParameter(f"--asymmetric belongs to --to compressed-tensors, not to {to.value}")
    settings: dict[str, Any] = {"exact": exact} | ({} if type is None else {"type": type.upper()})
    settings |= {"asymmetric": True} if asymmetric else {}
    settings |= {"version": version} if to is Format.gptq else {}
    widths = int(bits) if bits is not None and bits == int(bits) else bits
    target = TARGETS[to.value](**settings)
    summary = export(checkpoint, output, target, widths if level_map is None else level_map)
    write(json, summary.to_dict())
    show_export(summary)


@app.command("import")
def import_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="GGUF file, or directory of GPTQ, AWQ, compressed-tensors or bitsandbytes.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory.", show_default=False)],
) -> None:
    """Write MODEL as an ordinary 16-bit model directory. `quantize` takes such models as they are."""
    import_model(model, output)
    out.print(f"{printable(str(output))}: {megabytes(sum(file.stat().st_size for file in output.iterdir()))}")
