"""What fixed-point activations cost: a whole model in small steps, against exact floats on the same planes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import elastiq
from elastiq.evaluate import write_json
from elastiq.kernels.matmul.cpu import DIGITS
from elastiq.models import load_tokenizer
from elastiq.runtime import nested_matrices, with_cache

TOKENS = 8
"""Given at a time: few enough to be multiplied on the planes in every mode."""


def activations(
    checkpoint: Annotated[Path, typer.Option(help="Nested checkpoint.")],
    text: Annotated[Path, typer.Option(help="Evaluation text.")],
    bits: Annotated[str, typer.Option(help="Widths.")] = "4,8",
    window: int = 512,
    num_windows: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Perplexity of every activation mode, and its KL divergence from exact floats, in nats per token."""
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    windows = ids[0, : num_windows * window].view(num_windows, window)
    rows = []
    for width in map(int, bits.split(",")):
        model: Any = elastiq.load(checkpoint, bits=width)
        exact = [log_probabilities(model, one, "float") for one in windows]
        for mode in DIGITS:
            found = [log_probabilities(model, one, mode) for one in windows]
            divergence = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(exact, found, strict=True)])
            loss = torch.cat([F.nll_loss(f[:-1], w[1:], reduction="none") for f, w in zip(found, windows, strict=True)])
            rows.append(
                {"model": checkpoint.name, "bits": width, "activations": mode, "perplexity": float(loss.mean().exp()),
                 "kl_mean": float(divergence.mean()), "kl_max": float(divergence.max())}
            )  # fmt: skip
            print(rows[-1], flush=True)
    if json_file:
        write_json(json_file, {"rows": rows, "window": window, "windows": num_windows})


@torch.inference_mode()
def log_probabilities(model: Any, window: Tensor, mode: str) -> Tensor:
    """[tokens, vocabulary] in float64, the whole past in the cache."""
    for matrix in nested_matrices(model).values():
        matrix.activations = mode
    cache = DynamicCache(config=model.config)
    parts = [model(part[None], **with_cache(model, cache)).logits[0] for part in window.split(TOKENS)]
    return torch.log_softmax(torch.cat(parts).double(), dim=-1)
