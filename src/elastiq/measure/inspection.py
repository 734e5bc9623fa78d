"""Look at a model before it is quantized, or at a checkpoint after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint import CheckpointReader
from ..checkpoint.sizes import checkpoint_files, full_bytes, level_sizes
from ..core import Site, Stats
from ..evaluate.kinds import kind
from ..evaluate.table import mean_error
from ..inference.loading import tokens_way
from ..models import Layout, ModelSource, build_skeleton, discover
from ..pipeline.stream import BlockStream
from ..runtime import expected_way
from ..text import beginning
from ..text.calibration import Calibration, calibration_ids

_OUTLIER = 10.0
"""A channel is an outlier if its largest |x| exceeds this multiple of the median channel's."""
_FAR = 6.0
"""A weight is far out if it exceeds this multiple of the matrix's root mean square."""


def inspect_model(
    model: str | Path,
    *,
    activations: bool = True,
    calibration: Calibration = None,
    num_samples: int = 4,
    seq_len: int = 128,
    bos: bool = True,
    revision: str | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Shapes, sizes and outliers of a model that is not quantized yet, and what can and cannot be quantized.

    activations: run `num_samples` windows of `seq_len` tokens of `calibration` (default: the text in the package)
    through the blocks to find the largest inputs and outlier channels of every matrix; without, only weights are seen.
    bos: whether windows start as the tokenizer starts a text; what it puts there often makes the largest inputs.
    progress(what, done, total).

    Returns JSON-ready data: model, architecture, parameters, bytes_on_disk, matrices (one row each), skipped
    (name -> reason), tokens (which way single tokens will take). Raises ElastiqError for what is not a model or cannot
    be handled.
    """
    source = ModelSource(model, revision)
    skeleton = build_skeleton(source, torch.float32)
    layout = discover(skeleton)
    parameters = sum({id(p): p.numel() for p in skeleton.parameters()}.values())
    ids, seen = None, None
    if activations:
        tokenizer = source.tokenizer()
        start = beginning(tokenizer) if bos and not isinstance(calibration, Tensor) else ()
        ids = calibration_ids(calibration, tokenizer, num_samples, seq_len, bos=bos)
        seen = {"windows": len(ids), "window": ids.shape[1], "beginning": list(start)}
    rows = _rows(skeleton, source, layout, ids, device, progress)
    return {
        "model": source.path.resolve().name,
        "architecture": type(skeleton).__name__,
        "model_type": source.config.model_type,
        "parameters": parameters,
        "bytes_on_disk": source.num_bytes,
        "blocks": len(layout.blocks),
        "embedding": layout.embedding,
        "head": layout.head,
        "tied": layout.tied,
        "tokens": expected_way(skeleton, nested=False),
        "matrices": rows,
        "skipped": layout.skipped | _outer_reasons(layout),
        "activations": seen,
    }


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Matrices, levels, widths and sizes of a finished checkpoint, JSON-ready."""
    reader = CheckpointReader(path)
    sizes = level_sizes(reader, reader.available)
    return {
        "checkpoint": reader.path.resolve().name,
        "model_type": reader.config.get("model_type"),
        "recipe": reader.recipe.to_dict(),
        "levels": list(reader.levels),
        "available": list(reader.available),
        "widths": [{"bits": b, **sizes[b], "error": mean_error(reader.table, b)} for b in reader.available],
        "full_bytes": full_bytes(reader),
        "files": checkpoint_files(reader),
        "tokens": tokens_way(reader),
        "matrices": reader.table,
    }


def _rows(
    model: PreTrainedModel,
    source: ModelSource,
    layout: Layout,
    ids: Tensor | None,
    device: str,
    progress: Callable[[str, int, int], None] | None,
) -> list[dict[str, Any]]:
    """One row per matrix. Without `ids` the blocks see two tokens that nobody looks at."""
    shown = torch.zeros(1, 2, dtype=torch.int64) if ids is None else ids
    stream = BlockStream(model, source, layout, shown, frozenset({"abs_max"}), torch.float32, device)
    rows = []
    for block in range(len(layout.blocks)):
        if progress:
            progress("inspecting blocks", block, len(layout.blocks))
        weights = stream.weights(block)
        stats = {} if ids is None else stream.collect(block)
        rows += [_row(site, weights[site.name], stats.get(site.name)) for site in layout.at(block)]
        stream.advance(block)
    if progress:
        progress("inspecting blocks", len(layout.blocks), len(layout.blocks))
    return rows


def _row(site: Site, weight: Tensor, stats: Stats | None) -> dict[str, Any]:
    """Facts about one matrix and, where statistics were collected, its input."""
    rms = weight.square().mean().sqrt()
    scaled = weight / rms.clamp_min(torch.finfo(torch.float32).tiny)
    row: dict[str, Any] = {
        "name": site.name,
        "kind": kind(site.name),
        "role": site.role,
        "block": site.block,
        "shape": list(site.shape),
        "input_id": site.input_id,
        "weight_abs_max": weight.abs().max().item(),
        "weight_rms": rms.item(),
        "weight_kurtosis": scaled.square().square().mean().item(),
        "weight_outliers": (scaled.abs() > _FAR).float().mean().item(),
        "tokens": None,
        "input_abs_max": None,
        "input_outlier_channels": None,
    }
    channels = None if stats is None else stats.get("abs_max")
    if stats is not None and channels is not None:
        row["tokens"] = stats.count
        row["input_abs_max"] = channels.max().item()
        row["input_outlier_channels"] = int((channels > _OUTLIER * channels.median()).sum())
    return row


def _outer_reasons(layout: Layout) -> dict[str, str]:
    """Embedding and head are a matter of choice."""
    return {site.name: f"{site.role}, quantized only with --embeddings" for site in layout.outer}
