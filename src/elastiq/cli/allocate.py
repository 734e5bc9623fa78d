"""allocate, sensitivity, frontier: a width for every matrix."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..allocate import Budget, allocate, frontier, parse_bytes, parse_seconds, write_map
from ..core import Step
from ..measure import Bench, allocate_measured, latency_table, measure_sensitivity
from ..report import save_frontier
from .app import app
from .options import (
    Bos,
    Checkpoint,
    Device,
    FewWindows,
    Json,
    Rows,
    SensitivityName,
    Size,
    Untie,
    Window,
    usable_device,
    writable,
    write,
)
from .progress import Bars
from .tables import comma, out, show_allocation, show_frontier, show_sensitivity


@app.command("allocate")
def allocate_command(
    checkpoint: Checkpoint,
    bits: Annotated[
        float | None, typer.Option(help="Mean code width over the quantized matrices.", show_default=False)
    ] = None,
    bits_per_weight: Annotated[
        float | None, typer.Option(help="The same counted, scales and zero points included.", show_default=False)
    ] = None,
    size: Size = None,
    latency: Annotated[
        str | None, typer.Option(help="Per token on this machine, such as 35ms.", show_default=False)
    ] = None,
    max_damage: Annotated[
        str | None, typer.Option(help="kl=0.05: the smallest map within this damage.", show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Measure the map and the uniform one on --text, take the better.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Text file to measure maps on.", show_default=False)] = None,
    window: Window = 512,
    num_windows: FewWindows = 4,
    bos: Bos = True,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for the map.", show_default=False, callback=writable),
    ] = None,
    sensitivity: SensitivityName = None,
    allocator: Annotated[
        str | None, typer.Option(help="How the map is found. (default: integer-programme)", show_default=False)
    ] = None,
    untie: Untie = False,
    rows: Rows = False,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """The best level map within a budget; several limits hold together. Reads no weight but with --text."""
    budget = Budget(
        bits=bits,
        bits_per_weight=bits_per_weight,
        size=None if size is None else parse_bytes(size),
        latency=None if latency is None else parse_seconds(latency),
    )
    if verify and text is None:
        raise typer.BadParameter("--verify measures on a text; give --text FILE")
    options: dict[str, Any] = {"sensitivity": sensitivity, "allocator": allocator, "untie": untie, "rows": rows}
    options["max_kl"] = None if max_damage is None else _damage(max_damage)
    with Bars() as progress:
        if latency is not None:
            options["table"] = latency_table(checkpoint, untie=untie, device=usable_device(device), progress=progress)
        if text is None:
            found = allocate(checkpoint, budget, **options)
            result = found.to_dict()
        else:
            where = usable_device(device)
            bench = Bench(checkpoint, text, window=window, num_windows=num_windows, bos=bos, device=where)
            verdict = allocate_measured(bench, budget, **options)
            found, result = verdict.allocation, verdict.to_dict()
    if output is not None:
        write_map(output, found.level_map)
    write(json, result)
    show_allocation(found)
    if text is not None:
        out.print(f"measured on {text.name}: KL divergence {verdict.measured.kl:.4g} from the widest model")
    if out.is_terminal:
        out.print(f"\nnext: elastiq evaluate {checkpoint} --map {output or 'MAP.json'} --text FILE.txt", style="dim")


@app.command("sensitivity")
def sensitivity_command(
    checkpoint: Checkpoint,
    method: Annotated[str, typer.Option(help=f"One of {comma(sorted(Step.registry['sensitivity']))}.")] = "kl",
    text: Annotated[Path | None, typer.Option(help="Text file the model is run on.", show_default=False)] = None,
    window: Window = 512,
    num_windows: FewWindows = 4,
    bos: Bos = True,
    untie: Untie = False,
    device: Device = "cpu",
    restart: Annotated[bool, typer.Option("--restart", help="Measure again what is stored already.")] = False,
    json: Json = None,
) -> None:
    """What every matrix loses at every level, stored beside CHECKPOINT for allocate. Interrupted, it resumes."""
    with Bars() as progress:
        measured = measure_sensitivity(
            checkpoint,
            method,
            text,
            window=window,
            num_windows=num_windows,
            bos=bos,
            untie=untie,
            device=usable_device(device),
            restart=restart,
            progress=progress,
        )
    rows: list[Any] = [{"matrices": names, "losses": {**losses}} for names, losses in measured.groups]
    write(json, {"method": dict(measured.method), "text": measured.text, "seconds": measured.seconds, "groups": rows})
    show_sensitivity(measured)


@app.command("frontier")
def frontier_command(
    checkpoint: Checkpoint,
    sensitivity: SensitivityName = None,
    untie: Untie = False,
    rows: Rows = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the curve into this file (.png, .svg).", show_default=False, callback=writable),
    ] = None,
    json: Json = None,
) -> None:
    """The whole curve of damage against bits, uniform widths marked; --json has every step in any-time order."""
    curve = frontier(checkpoint, sensitivity=sensitivity, untie=untie, rows=rows)
    write(json, asdict(curve))
    if picture is not None:
        save_frontier(curve, picture)
    show_frontier(curve)


def _damage(text: str) -> float:
    """The number of `kl=0.05`."""
    name, _, value = text.partition("=")
    try:
        if name.strip() == "kl":
            return float(value)
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is no bound on damage; write it as kl=0.05", param_hint="--max-damage")
