"""Measure one checkpoint at several widths."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ..models import ModelSource, build_skeleton, give_back_memory, load_module
from ..runtime import token_way
from ..text import Windows, begins, check_ids, read_text
from ..text.evaluation import checkpoint_tokenizer, windows
from .card import write_card
from .record import keep, row_key, row_name, row_order
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
    bos: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    save: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity, KL divergence to the model `against` and top-1 agreement of a checkpoint at each width in `bits`.

    bits: widths, mean widths such as 3.37 (for which a map is allocated) and level maps; None for the levels that have
    scales of their own. text: path of a text file, read as one text and cut into windows that do not overlap. Each
    starts as the tokenizer starts a text, unless `bos` is false: these tokens count in `window`, are never predicted
    and are context for all others; without any, the first token of a window is not predicted either. against: the
    16-bit model (directory, or hub name with `revision`); without it the KL fields are None. dtype: of the arithmetic,
    for both. save: merge the result into `evaluation.json` beside the checkpoint. progress(what, done, total).

    Returns {"full": {"perplexity"}, "levels": [{"bits", "bits_per_weight", "perplexity", "kl_mean", ...}], "tokens",
    "protocol"}; a level that is a map has its mean width as "bits", and "map", which stands for its widths; tokens says
    which way single tokens take (`runtime.token_way`). Raises ElastiqError for a width the checkpoint cannot give, a
    text shorter than a window, models that do not match.
    """
    reader = CheckpointReader(path)
    window, num_windows = plain_count(window, "window"), plain_count(num_windows, "num_windows")
    targets = readings(reader, bits)
    content = read_text(text, "text")
    cut = windows(content, checkpoint_tokenizer(path), window, num_windows, Path(text).name, bos=bos)
    model = load(path, max(target.widest for target in targets), device=device, dtype=dtype)
    check_windows(model, cut, Path(text).name)
    full = None if against is None else load_full(against, revision, device, dtype)
    if full is not None:
        check_ids(full, cut.ids, "against")
    scores, full_scores = _measure(model, full, targets, cut, device, progress)
    result = {
        "checkpoint": Path(path).resolve().name,
        "against": None if against is None else Path(against).name,
        "tokens": token_way(model),
        "protocol": _protocol(content, Path(text).name, cut, dtype),
        "full": {
            "perplexity": full_scores.perplexity if full is not None else None,
            "bytes_in_memory": full_bytes(reader),
        },
        "levels": [
            {**target.label, **map_sizes(reader, target.widths, dtype), **score.to_dict()}
            for target, score in zip(targets, scores, strict=True)
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
    targets: Sequence[Reading],
    cut: Windows,
    device: str,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[list[Scores], Scores]:
    """Scores per reading and of the full model, whose logits live for one batch: windows outside, widths inside."""
    scores = [Scores(f"{row_name(target.label)} bits") for target in targets]
    ids = cut.ids.to(device)
    full_scores = Scores("the full model")
    batch = min(_MOST_WINDOWS, max(1, _LOGITS_BYTES // (4 * ids.shape[1] * model.config.vocab_size)))
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        came = part[:, cut.first :].flatten()
        reference = None if full is None else _logits(full, part, cut.first)
        if reference is not None:
            full_scores.add(reference, came)
        for index, target in enumerate(targets):
            if progress:
                progress("evaluating", first * len(targets) + index * len(part), len(ids) * len(targets))
            set_bits(model, target.widths)
            logits = _logits(model, part, cut.first)
            if reference is not None and logits.shape != reference.shape:
                raise ElastiqError(
                    f"against: vocabularies differ ({reference.shape[-1]} and {logits.shape[-1]}); "
                    "give the model the checkpoint was made from"
                )
            scores[index].add(logits, came, reference)
            del logits
            give_back_memory()
    if progress:
        progress("evaluating", len(ids) * len(targets), len(ids) * len(targets))
    return scores, full_scores


def _logits(model: PreTrainedModel, ids: Tensor, first: int) -> Tensor:
    """[windows * (window - first), vocabulary]: what is predicted for the tokens of each window from `first` on."""
    return model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1].flatten(0, 1)


@dataclass(frozen=True)
class Reading:
    """One way to read a checkpoint. label: what stands for it in a result, "bits", its width or mean width, and for
    several widths "map", the digest of `widths`."""

    label: Mapping[str, Any]
    widths: Mapping[str, Width]

    @property
    def widest(self) -> int:
        """The width that needs the most planes."""
        return max(map(widest, self.widths.values()))


def readings(reader: CheckpointReader, bits: Sequence[float | LevelMap] | None) -> list[Reading]:
    """What `bits` asks for, ascending, each once: two maps of one mean width are two, a map of one width is that
    width."""
    found: dict[str | float, Reading] = {}
    for wanted in map(plain_widths, reader.levels if bits is None else bits):
        if isinstance(wanted, int):
            reader.require(wanted)
            widths = dict[str, Width](dict.fromkeys(reader.manifest.matrices, wanted))
        else:
            widths = complete(reader, map_widths(reader, wanted))
        level_map = LevelMap(widths)
        label: dict[str, Any] = {"bits": level_map.uniform}
        if level_map.uniform is None:
            mean = wanted if isinstance(wanted, float) else round(map_mean_bits(reader, widths), 4)
            label = {"bits": mean, "map": level_map.digest}
        found.setdefault(row_key(label), Reading(label, widths))
    return sorted(found.values(), key=lambda reading: row_order(reading.label))


def check_windows(model: PreTrainedModel, cut: Windows, name: str) -> None:
    """Raises ElastiqError for windows of the text `name` that the model cannot read."""
    context, window = getattr(model.config, "max_position_embeddings", None), cut.ids.shape[1]
    if context and window > context:
        raise ElastiqError(f"window={window} exceeds the model's context of {context}; use --window {context}")
    check_ids(model, cut.ids, f"text: {name}")


def _protocol(content: str, name: str, cut: Windows, dtype: torch.dtype) -> dict[str, Any]:
    count, window = cut.ids.shape
    precision = str(dtype).removeprefix("torch.")
    return {
        "words": f"{name} as one text, {begins(cut.beginning)}, {count} non-overlapping windows of {window} tokens, "
        f"{window - cut.first} predictions each; {precision} arithmetic",
        "text": name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "window": window,
        "num_windows": count,
        "predicted_tokens": count * (window - cut.first),
        "dtype": precision,
        **({"beginning": list(cut.beginning)} if cut.beginning else {}),
    }


def _keep(path: str | Path, result: dict[str, Any]) -> None:
    """A checkpoint that cannot be written is no reason to lose the result."""
    try:
        keep(path, result)
        write_card(path)
    except ElastiqError as error:
        log.warning("%s; the report will not show this evaluation", error)
