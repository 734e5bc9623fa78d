"""Measure one checkpoint at several widths."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..allocate import complete
from ..checkpoint import CheckpointReader
from ..checkpoint.sizes import full_bytes, map_mean_bits, map_sizes
from ..core import ElastiqError, LevelMap, Width, library_errors, plain_count, widest
from ..inference.loading import load, map_widths, plain_widths, set_bits
from ..models import ModelSource, build_skeleton, give_back_memory, load_module, load_tokenizer
from ..runtime import token_way
from ..text.evaluation import read_text, windows
from .card import write_card
from .record import keep
from .scores import Scores

log = logging.getLogger("elastiq")

_LOGITS_BYTES = 2**29
"""Logits of one batch in float32: about what the full model's answers may take while the widths are compared."""
_MOST_WINDOWS = 8
"""Windows in one batch, whatever the vocabulary: enough to decode each matrix rarely, few enough to see progress."""


def evaluate(
    path: str | Path,
    bits: Sequence[float | LevelMap] | None,
    text: str | Path,
    *,
    against: str | Path | None = None,
    revision: str | None = None,
    window: int = 512,
    num_windows: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    save: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity, KL divergence to the model `against` and top-1 agreement of a checkpoint at each width in `bits`.

    bits: widths, mean widths such as 3.37 (for which a map is allocated) and level maps; None for the levels that have
    scales of their own. text: path of a text file, read as one text without special tokens and cut into windows that do
    not overlap, `window` - 1 predictions each. against: the 16-bit model (directory, or hub name with `revision`);
    without it the KL fields are None. dtype: of the arithmetic, for both. save: merge the result into
    `evaluation.json` beside the checkpoint. progress(what, done, total).

    Returns {"full": {"perplexity"}, "levels": [{"bits", "bits_per_weight", "perplexity", "kl_mean", ...}], "tokens",
    "protocol"}; tokens says which way single tokens take (`runtime.token_way`).
    Raises ElastiqError for a width the checkpoint cannot give, a text shorter than a window, models that do not match.
    """
    reader = CheckpointReader(path)
    window, num_windows = plain_count(window, "window"), plain_count(num_windows, "num_windows")
    targets = width_maps(reader, bits)
    content = read_text(text)
    ids = windows(content, load_tokenizer(path), window, num_windows, Path(text).name)
    most = max(widest(width) for widths in targets.values() for width in widths.values())
    model = load(path, most, device=device, dtype=dtype)
    _check_context(model, window)
    full = None if against is None else load_full(against, revision, device, dtype)
    scores, full_scores = _measure(model, full, targets, ids.to(device), progress)
    result = {
        "checkpoint": Path(path).resolve().name,
        "against": None if against is None else Path(against).name,
        "tokens": token_way(model),
        "protocol": _protocol(content, Path(text).name, ids, dtype),
        "full": {
            "perplexity": full_scores.perplexity if full is not None else None,
            "bytes_in_memory": full_bytes(reader),
        },
        "levels": [
            {"bits": b, **map_sizes(reader, widths, dtype), **scores[b].to_dict()} for b, widths in targets.items()
        ],
    }
    if save:
        _keep(path, result)
    return result


def load_full(model: str | Path, revision: str | None, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """The 16-bit model in evaluation mode; only safetensors are read and no code of a repository runs.

    transformers reads it, so that what `quantize` read is compared with somebody else's reading.
    Raises ElastiqError if it is not a model transformers can load.
    """
    source = ModelSource(model, revision)
    if source.is_eight_bit:  # which transformers reads for some devices and layouts, or without its scales
        own = build_skeleton(source, dtype)
        load_module(own, "", source, dtype, device)
        return own
    with library_errors(f"{source.path}: transformers cannot load it", "give a model that it loads"):
        full: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    return full.to(device).eval()


@torch.inference_mode()
def _measure(
    model: PreTrainedModel,
    full: PreTrainedModel | None,
    maps: Mapping[float, Mapping[str, Width]],
    ids: Tensor,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[float, Scores], Scores]:
    """Scores per width and of the full model, whose logits live for one batch: windows outside, widths inside."""
    scores = {b: Scores(f"{b} bits") for b in maps}
    full_scores = Scores("the full model")
    batch = min(_MOST_WINDOWS, max(1, _LOGITS_BYTES // (4 * ids.shape[1] * model.config.vocab_size)))
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        targets = part[:, 1:].flatten()
        reference = None if full is None else _logits(full, part)
        if reference is not None:
            full_scores.add(reference, targets)
        for index, (b, widths) in enumerate(maps.items()):
            if progress:
                progress("evaluating", first * len(maps) + index * len(part), len(ids) * len(maps))
            set_bits(model, widths)
            logits = _logits(model, part)
            if reference is not None and logits.shape != reference.shape:
                raise ElastiqError(
                    f"against: vocabularies differ ({reference.shape[-1]} and {logits.shape[-1]}); "
                    "give the model the checkpoint was made from"
                )
            scores[b].add(logits, targets, reference)
            del logits
            give_back_memory()
    if progress:
        progress("evaluating", len(ids) * len(maps), len(ids) * len(maps))
    return scores, full_scores


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[windows * (window - 1), vocabulary]: what is predicted for every token but the first of each window."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


def width_maps(reader: CheckpointReader, bits: Sequence[float | LevelMap] | None) -> dict[float, dict[str, Width]]:
    """Widths of the matrices by what stands for them in the result: a width, or a mean width."""
    targets: dict[float, dict[str, Width]] = {}
    for wanted in map(plain_widths, reader.levels if bits is None else bits):
        if isinstance(wanted, int):
            reader.require(wanted)
            targets[wanted] = dict[str, Width](dict.fromkeys(reader.manifest.matrices, wanted))
        else:
            widths = complete(reader, map_widths(reader, wanted))
            targets[round(map_mean_bits(reader, widths), 4) if isinstance(wanted, LevelMap) else wanted] = widths
    return dict(sorted(targets.items()))


def _check_context(model: PreTrainedModel, window: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context and window > context:
        raise ElastiqError(f"window={window} exceeds the model's context of {context}; use --window {context}")


def _protocol(content: str, name: str, ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    count, window = ids.shape
    precision = str(dtype).removeprefix("torch.")
    return {
        "words": f"{name} as one text, no special tokens, {count} non-overlapping windows of {window} tokens, "
        f"{window - 1} predictions each; {precision} arithmetic",
        "text": name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "window": window,
        "num_windows": count,
        "predicted_tokens": count * (window - 1),
        "dtype": precision,
    }


def _keep(path: str | Path, result: dict[str, Any]) -> None:
    """A checkpoint that cannot be written is no reason to lose the result."""
    try:
        keep(path, result)
        write_card(path)
    except ElastiqError as error:
        log.warning("%s; the report will not show this evaluation", error)
