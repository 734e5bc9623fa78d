"""The command line."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from . import __version__, recipes
from .allocate import Budget, allocate, frontier, parse_bytes, parse_seconds, read_map, write_map
from .checkpoint import CheckpointReader, slice_checkpoint
from .core import MAX_BITS, ElastiqError, LevelMap, Step
from .evaluate import (
    evaluate,
    inspect_checkpoint,
    inspect_model,
    load_tokenizer,
    megabytes,
    write_json,
)
from .export import TARGETS, export
from .generate import generate
from .importing import import_model
from .load import load
from .measure import Bench, allocate_measured, latency_table, measure_sensitivity
from .methods import methods, papers
from .methods import page as methods_page
from .quantize import plan, quantize
from .report import save_frontier, write_report
from .report.terminal import (
    comma,
    out,
    printable,
    show_allocation,
    show_checkpoint,
    show_estimate,
    show_evaluation,
    show_export,
    show_frontier,
    show_inspection,
    show_methods,
    show_plan,
    show_sensitivity,
    show_summary,
)

log = logging.getLogger("elastiq")
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INTERRUPTED = 130
_KEPT = {
    "quantize": "; finished blocks are kept, the same command resumes",
    "sensitivity": "; what was measured is kept, the same command resumes",
}


class Commands(TyperGroup):
    """Turns the errors a user can mend into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail(f"interrupted{_KEPT.get(ctx.invoked_subcommand, '')}")
            raise typer.Exit(_INTERRUPTED) from None
        except (ElastiqError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            _fail(str(error))
            raise typer.Exit(1) from None
        except torch.OutOfMemoryError:
            _fail("the device has not enough memory; use --device cpu, fewer samples or a smaller window")
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help="Quantize a language model once into one nested checkpoint, run it at any precision from 1 to 8 bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Method(StrEnum):
    nested = "nested"
    nested_tuned = "nested-tuned"
    gptq = "gptq"
    rtn = "rtn"


class Inputs(StrEnum):
    full = "full"
    quantized = "quantized"


class Format(StrEnum):
    gguf = "gguf"
    gptq = "gptq"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    hf = "hf"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[Path, typer.Argument(help="Directory that `elastiq quantize` made.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Model directory, or a hub name.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.", show_default=False)]
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
Window = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
FewWindows = Annotated[int, typer.Option(help="Windows of the text.", min=1)]
Text_ = Annotated[Path, typer.Option("--text", help="Text file to measure on.", show_default=False)]


def main() -> None:
    """Entry point of the `elastiq` command."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"elastiq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    log.handlers = [RichHandler(console=err, show_time=False, show_path=False, markup=False)]
    log.propagate = False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@app.command("quantize")
def quantize_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the checkpoint.", show_default=False)],
    recipe: Annotated[
        Method,
        typer.Option(help="nested: one code serves every level; nested-tuned: trained scales; gptq, rtn: truncated."),
    ] = Method.nested,
    levels: Annotated[str, typer.Option(help="Widths that get scales of their own.")] = "2,3,4,6,8",
    group_size: Annotated[int, typer.Option(help="Input channels per scale; -1 is the whole row.")] = 64,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Range is +-max; no zero points.")] = False,
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
            help="Text or JSONL file that a tuner trains on; several share equally. (default: the calibration's)",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        Precision | None, typer.Option(help="Arithmetic of the forward passes.", show_default=False)
    ] = None,
    revision: Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an unfinished run and start over.")] = False,
    json: Json = None,
) -> None:
    """Quantize MODEL once into the nested checkpoint OUTPUT. Interrupted, the same command resumes."""
    chosen = recipes.get(
        recipe.value,
        levels=_widths("--levels", levels),
        group_size=group_size,
        symmetric=symmetric,
        embeddings=embeddings,
        inputs=inputs.value,
    )
    if dry_run:
        planned = plan(model, chosen, num_samples=num_samples, seq_len=seq_len, revision=revision)
        _write(json, planned.to_dict())
        show_plan(planned)
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
            revision=revision,
            device=_device(device),
            dtype=None if dtype is None else _DTYPES[dtype.value],
            restart=restart,
            progress=progress,
        )
    _write(json, summary.to_dict())
    show_summary(summary, model)


@app.command("evaluate")
def evaluate_command(
    checkpoint: Checkpoint,
    text: Text_,
    bits: Annotated[
        str | None,
        typer.Option(help="Widths; fractions are allocated: 2,3.37,4. (default: every level)", show_default=False),
    ] = None,
    memory: Size = None,
    level_map: Map = None,
    against: Annotated[
        str | None, typer.Option(help="The 16-bit model, for KL divergence and agreement.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    num_windows: Annotated[
        int | None, typer.Option(help="At most so many windows. (default: all)", min=1, show_default=False)
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of both models.")] = Precision.float32,
    revision: Revision = None,
    json: Json = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of CHECKPOINT at every width."""
    wanted: list[float | LevelMap] = [] if bits is None else [*_mean_widths("--bits", bits)]
    wanted += [] if level_map is None else [read_map(level_map)]
    wanted += [] if memory is None else [allocate(checkpoint, Budget(size=parse_bytes(memory))).level_map]
    with Bars() as progress:
        result = evaluate(
            checkpoint,
            wanted or None,
            text,
            against=against,
            revision=revision,
            window=window,
            num_windows=num_windows,
            device=_device(device),
            dtype=_DTYPES[dtype.value],
            progress=progress,
        )
    _write(json, result)
    show_evaluation(result)
    if out.is_terminal:
        out.print(f"\nnext: elastiq report {checkpoint}", style="dim")


@app.command("generate")
def generate_command(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What to answer or to continue.", show_default=False)],
    bits: Annotated[
        float | None,
        typer.Option(help="Width, or mean width. (default: the largest)", min=1, max=MAX_BITS, show_default=False),
    ] = None,
    memory: Size = None,
    level_map: Map = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.", min=0.0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the tokens that hold this much of the probability.", max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, with a temperature.")] = 0,
    device: Device = "cpu",
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Arithmetic. (default: float32 on a CPU, else the model's own)", show_default=False),
    ] = None,
) -> None:
    """Answer PROMPT at one width, printing as the tokens come."""
    tokenizer = load_tokenizer(checkpoint)
    tokens = _prompt_tokens(tokenizer, prompt, raw)
    if sum(given is not None for given in (bits, memory, level_map)) > 1:
        raise typer.BadParameter("give one of --bits, --memory and --map")
    widths = int(bits) if bits is not None and bits == int(bits) else bits
    model: Any = load(
        checkpoint,
        widths if level_map is None else level_map,
        memory=memory,
        device=_device(device),
        dtype=None if dtype is None else _DTYPES[dtype.value],
    )
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    begin, count = time.perf_counter(), 0
    for token in generate(
        model, tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    ):
        streamer.put(torch.tensor([token]))
        count += 1
    streamer.end()
    if out.is_terminal:
        out.print(f"{count} tokens, {count / (time.perf_counter() - begin):.1f} per second", style="dim")


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
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the map.", show_default=False)] = None,
    sensitivity: SensitivityName = None,
    allocator: Annotated[
        str | None, typer.Option(help="How the map is found. (default: integer-programme)", show_default=False)
    ] = None,
    untie: Untie = False,
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
    options: dict[str, Any] = {"sensitivity": sensitivity, "allocator": allocator, "untie": untie}
    options["max_kl"] = None if max_damage is None else _damage(max_damage)
    with Bars() as progress:
        if latency is not None:
            options["table"] = latency_table(checkpoint, untie=untie, device=_device(device), progress=progress)
        if text is None:
            found = allocate(checkpoint, budget, **options)
            result = found.to_dict()
        else:
            bench = Bench(checkpoint, text, window=window, num_windows=num_windows, device=_device(device))
            verdict = allocate_measured(bench, budget, **options)
            found, result = verdict.allocation, verdict.to_dict()
    if output is not None:
        write_map(output, found.level_map)
    _write(json, result)
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
            untie=untie,
            device=_device(device),
            restart=restart,
            progress=progress,
        )
    rows: list[Any] = [{"matrices": names, "losses": {**losses}} for names, losses in measured.groups]
    _write(json, {"method": dict(measured.method), "text": measured.text, "seconds": measured.seconds, "groups": rows})
    show_sensitivity(measured)


@app.command("frontier")
def frontier_command(
    checkpoint: Checkpoint,
    sensitivity: SensitivityName = None,
    untie: Untie = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the curve into this file (.png, .svg).", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """The whole curve of damage against bits, uniform widths marked; --json has every step in any-time order."""
    curve = frontier(checkpoint, sensitivity=sensitivity, untie=untie)
    _write(json, asdict(curve))
    if picture is not None:
        save_frontier(curve, picture)
    show_frontier(curve)


@app.command("report")
def report_command(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="(default: CHECKPOINT/report.html)", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page with pictures about CHECKPOINT."""
    out.print(str(write_report(checkpoint, output)))


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
    device: Device = "cpu",
    revision: Revision = None,
    json: Json = None,
) -> None:
    """Shapes, sizes, outliers, what will be quantized and what that takes."""
    if (Path(model) / "levels.json").is_file():
        result = inspect_checkpoint(model)
        _write(json, result)
        show_checkpoint(result)
        return
    with Bars() as progress:
        result = inspect_model(
            model,
            activations=activations,
            calibration=calibration or None,
            num_samples=num_samples,
            seq_len=seq_len,
            device=_device(device),
            revision=revision,
            progress=progress,
        )
    planned = plan(model, revision=revision)
    _write(json, {**result, "plan": planned.to_dict()})
    show_inspection(result)
    show_estimate(planned)


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
    reader = CheckpointReader(output)
    size = megabytes(sum(file.stat().st_size for file in output.iterdir()))
    out.print(f"{output}: {comma(reader.available)} bits, {size}")


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
    _write(json, summary.to_dict())
    show_export(summary)


@app.command("import")
def import_command(
    model: Annotated[
        Path, typer.Argument(help="GGUF file, or directory of GPTQ, AWQ or compressed-tensors.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory.", show_default=False)],
) -> None:
    """Write MODEL as an ordinary 16-bit model directory. `quantize` takes such models as they are."""
    import_model(model, output)
    out.print(f"{printable(str(output))}: {megabytes(sum(file.stat().st_size for file in output.iterdir()))}")


@app.command("recipes")
def recipes_command(
    page: Annotated[Path | None, typer.Option(help="Write docs/methods.md here.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """The recipes, and every part that a recipe can be made of: what it does, needs and comes from."""
    rows = methods()
    _write(json, rows)
    if page is not None:
        page.write_text(methods_page(), encoding="utf-8")
    show_methods(recipes.names(), rows)


@app.command("cite")
def cite_command(checkpoint: Checkpoint) -> None:
    """The papers behind CHECKPOINT."""
    for slot, titles in papers(CheckpointReader(checkpoint).recipe).items():
        for title in titles or ("no paper",):
            out.print(f"{slot}: {title}")


class Bars:
    """progress(what, done, total) as bars with time left on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=not out.is_terminal,
            speed_estimate_period=3600,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            for task in self._progress.tasks:
                self._progress.update(task.id, visible=not task.finished)
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def _fail(message: str) -> None:
    err.print(Text(f"elastiq: error: {' '.join(printable(message).split())}", style="red"))


def _widths(option: str, text: str) -> tuple[int, ...]:
    """`2,3,4` as ascending numbers."""
    try:
        widths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 2,3,4", param_hint=option) from None
    if widths[0] < 1 or widths[-1] > MAX_BITS:
        wrong = next(w for w in widths if not 1 <= w <= MAX_BITS)
        raise typer.BadParameter(f"{wrong} is not a width from 1 to {MAX_BITS}", param_hint=option)
    return tuple(widths)


def _mean_widths(option: str, text: str) -> list[float]:
    """`2,3.37,4` as ascending numbers, whole ones as int."""
    try:
        widths = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 2,3.37,4", param_hint=option) from None
    if wrong := [width for width in widths if not 1 <= width <= MAX_BITS]:
        raise typer.BadParameter(f"{wrong[0]:g} is not a width from 1 to {MAX_BITS}", param_hint=option)
    return [int(width) if width == int(width) else width for width in widths]


def _damage(text: str) -> float:
    """The number of `kl=0.05`."""
    name, _, value = text.partition("=")
    try:
        if name.strip() == "kl":
            return float(value)
    except ValueError:
        pass
    raise typer.BadParameter(f"{text!r} is no bound on damage; write it as kl=0.05", param_hint="--max-damage")


def _device(name: str) -> str:
    """The device if torch can use it here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "unknown to torch")
        raise ElastiqError(f"device {name!r} cannot be used ({reason}); use --device cpu") from None
    return name


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> torch.Tensor:
    """[1, tokens] of the prompt, in the model's chat template where it has one."""
    if raw or not tokenizer.chat_template:
        ids: Any = tokenizer(prompt, return_tensors="pt")["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}]
        try:
            rendered: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            raise ElastiqError(f"the model's chat template cannot render the prompt ({error}); use --raw") from None
        ids = rendered["input_ids"]
    if not ids.shape[-1]:
        raise ElastiqError("the prompt is empty; give some text")
    return ids.long()


def _write(file: Path | None, data: Any) -> None:
    if file is not None:
        write_json(file, data)


if __name__ == "__main__":
    main()
