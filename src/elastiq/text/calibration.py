"""Windows of token ids from whatever a user calibrates on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core import ElastiqError, library_errors
from ..embedded import calibration_text
from .files import read_records, read_text
from .tokens import Windows, beginning, tokenize

Calibration = str | Path | Sequence[str | Path | dict[str, Any]] | Tensor | None
TEXT_FILES = (".txt", ".md")


def calibration_ids(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    num_samples: int,
    seq_len: int,
    *,
    bos: bool = True,
) -> Tensor:
    """At most `num_samples` windows of token ids, int64 [n, seq_len].

    calibration: a .txt, .md or .jsonl file; a list whose members are texts (str), files (Path) or records (dict); a
    tensor of ids; None for the text that travels with the package. A record is {"text": ...} or {"messages": [...]},
    the latter rendered with the tokenizer's chat template. Everything is joined by blank lines into one text and cut
    into consecutive windows that do not overlap, from its start, each behind what the tokenizer puts in front of a
    text unless `bos` is false; seq_len counts that. Ids say themselves how they begin: those of one dimension are cut
    into windows, rows of a matrix are windows already (cut to seq_len where they are longer). Raises ElastiqError for
    what cannot be read and for less than one window.
    """
    if isinstance(calibration, Tensor):
        return _windows_of_ids(calibration, num_samples, seq_len)
    if tokenizer is None:
        raise ElastiqError("calibration: text needs a tokenizer; give a tensor of token ids instead")
    start = beginning(tokenizer) if bos else ()
    room = seq_len - len(start)
    if room < 1:
        raise ElastiqError(
            f"calibration: seq_len={seq_len} has no room for text behind what the tokenizer begins with; "
            f"use more than {len(start)}"
        )
    ids = _tokenize(_text(calibration, tokenizer), tokenizer, num_samples * room, start)
    if len(ids) < room:
        raise _too_short(len(ids), seq_len)
    return Windows.of(ids, start, seq_len, num_samples).ids


def tuning_ids(
    tuning: Calibration,
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase | None,
    num_samples: int,
    seq_len: int,
    *,
    bos: bool = True,
) -> Tensor:
    """Windows for a tuner, as `calibration_ids`, but the members of a list give equal numbers of them instead of being
    joined. Without `tuning`: half of them from `calibration` and half from the text that travels with the package, so
    that the model is not fitted to one kind of text; all from token ids, which say nothing of their kind."""
    texts: list[Calibration]
    if isinstance(tuning, Sequence) and not isinstance(tuning, str):
        texts = [[text] for text in tuning]
    elif tuning is not None:
        texts = [tuning]
    elif calibration is None or isinstance(calibration, Tensor):
        texts = [calibration]
    else:
        texts = [calibration, None]
    share = -(-num_samples // len(texts))
    parts = [calibration_ids(text, tokenizer, share, seq_len, bos=bos) for text in texts]
    return torch.cat(parts)[:num_samples]


def file_names(calibration: Calibration) -> list[str]:
    """Names, without their directories, of the files among what is calibrated on."""
    members = [Path(calibration)] if isinstance(calibration, str | Path) else calibration
    return [] if members is None or isinstance(members, Tensor) else [m.name for m in members if isinstance(m, Path)]


def _windows_of_ids(ids: Tensor, num_samples: int, seq_len: int) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise ElastiqError("calibration: token ids must be whole numbers in one or two dimensions")
    if not ids.numel() or (ids.dim() == 1 and ids.numel() < seq_len):
        raise _too_short(ids.shape[-1], seq_len)
    if ids.dim() == 1:
        ids = ids[: ids.numel() // seq_len * seq_len].view(-1, seq_len)
    return ids[:num_samples, :seq_len].to("cpu", torch.long).contiguous()


def _too_short(count: int, seq_len: int) -> ElastiqError:
    return ElastiqError(
        f"calibration: {count} tokens are less than one window of {seq_len}; give a longer text or a smaller seq_len"
    )


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, wanted: int, start: tuple[int, ...]) -> list[int]:
    """Ids of the first `wanted` tokens or more, of all tokens if there are fewer; no more text is read than needed."""
    length = 8 * wanted
    while True:
        ids = tokenize(text[:length], tokenizer, "calibration", start)
        if length >= len(text) or len(ids) > wanted + 16:  # the cut may spoil the last tokens
            return ids
        length *= 2


def _text(calibration: str | Path | Sequence[str | Path | dict[str, Any]] | None, tokenizer: Any) -> str:
    if calibration is None:
        return calibration_text()
    if isinstance(calibration, str | Path):
        return _read_file(Path(calibration), tokenizer)
    return "\n\n".join(_member(member, index, tokenizer) for index, member in enumerate(calibration))


def _member(member: str | Path | dict[str, Any], index: int, tokenizer: Any) -> str:
    if isinstance(member, Path):
        return _read_file(member, tokenizer)
    return member if isinstance(member, str) else _render(member, f"calibration record {index}", tokenizer)


def _read_file(file: Path, tokenizer: Any) -> str:
    if file.suffix not in (*TEXT_FILES, ".jsonl"):
        raise ElastiqError(f"{file}: calibration reads .txt, .md and .jsonl files, not {file.suffix or 'this kind'!r}")
    if file.suffix != ".jsonl":
        return read_text(file, "calibration")
    records = read_records(file, "calibration")
    return "\n\n".join(_render(record, f"calibration: {file}, line {number}", tokenizer) for number, record in records)


def _render(record: Any, where: str, tokenizer: Any) -> str:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ElastiqError(f'{where}: a record is {{"text": "..."}} or {{"messages": [...]}}')
    if not tokenizer.chat_template:
        raise ElastiqError(f"{where}: the model has no chat template to render messages with; give plain text")
    with library_errors(f"{where}: the chat template cannot render these messages", "mend them, or give plain text"):
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
