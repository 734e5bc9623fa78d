"""evaluate, generate: a checkpoint at work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..allocate import Budget, allocate, parse_bytes, read_map
from ..core import MAX_BITS, ElastiqError, LevelMap, library_errors
from ..evaluate import evaluate, evaluate_tasks
from ..inference.generation import generate
from ..inference.loading import load
from ..text import beginning, require_characters, tokenize
from ..text.evaluation import checkpoint_tokenizer
from .app import app
from .options import (
    DTYPES,
    Bos,
    Checkpoint,
    Device,
    Json,
    Map,
    Precision,
    Revision,
    Size,
    mean_widths,
    usable_device,
    write,
)
from .progress import Bars
from .tables import out, show_evaluation, show_tasks


@app.command("evaluate")
def evaluate_command(
    checkpoint: Checkpoint,
    text: Annotated[Path | None, typer.Option("--text", help="Text file to measure on.", show_default=False)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="For lm-evaluation-harness: a.jsonl,b.yaml,name.", show_default=False),
    ] = None,
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
    bos: Bos = True,
    limit: Annotated[
        int | None, typer.Option(help="Items of each task. (default: all)", min=1, show_default=False)
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Answer tasks again whose results are stored.")] = False,
    device: Device = "cpu",
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of both models.")] = Precision.float32,
    revision: Revision = None,
    json: Json = None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of CHECKPOINT at every width, or its results on --tasks."""
    if (text is None) == (tasks is None):
        raise typer.BadParameter("give one of --text FILE and --tasks NAMES")
    wanted: list[float | LevelMap] = [] if bits is None else [*mean_widths("--bits", bits)]
    wanted += [] if level_map is None else [read_map(level_map)]
    wanted += [] if memory is None else [allocate(checkpoint, Budget(size=parse_bytes(memory))).level_map]
    common: dict[str, Any] = {"against": against, "revision": revision, "bos": bos}
    common |= {"device": usable_device(device), "dtype": DTYPES[dtype.value]}
    with Bars() as progress:
        if text is not None:
            result = evaluate(
                checkpoint, wanted or None, text, window=window, num_windows=num_windows, progress=progress, **common
            )
        else:
            names = [name.strip() for name in str(tasks).split(",") if name.strip()]
            result = evaluate_tasks(
                checkpoint, wanted or None, names, limit=limit, restart=restart, progress=progress, **common
            )
    write(json, result)
    (show_evaluation if text is not None else show_tasks)(result)
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
    tokenizer = checkpoint_tokenizer(checkpoint)
    tokens = _prompt_tokens(tokenizer, prompt, raw)
    if sum(given is not None for given in (bits, memory, level_map)) > 1:
        raise typer.BadParameter("give one of --bits, --memory and --map")
    widths = int(bits) if bits is not None and bits == int(bits) else bits
    model: Any = load(
        checkpoint,
        widths if level_map is None else level_map,
        memory=memory,
        device=usable_device(device),
        dtype=None if dtype is None else DTYPES[dtype.value],
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


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> torch.Tensor:
    """[1, tokens] of the prompt, in the model's chat template where it has one."""
    require_characters(prompt, "the prompt")
    if raw or not tokenizer.chat_template:
        start = beginning(tokenizer)
        ids: Any = torch.tensor([[*start, *tokenize(prompt, tokenizer, "the prompt", start)]], dtype=torch.long)
    else:
        messages = [{"role": "user", "content": prompt}]
        with library_errors("the model's chat template cannot render the prompt", "use --raw"):
            rendered: Any = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids = rendered["input_ids"]
    if not ids.shape[-1]:
        raise ElastiqError("the prompt is empty; give some text")
    return ids.long()
