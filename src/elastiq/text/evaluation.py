"""The protocol: how a text file becomes windows of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..checkpoint import CheckpointReader
from ..checkpoint.names import CHECKSUMS
from ..core import ElastiqError
from ..models import load_tokenizer


def read_text(path: str | Path) -> str:
    """The whole file. Raises ElastiqError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ElastiqError(f"text: {path} is not UTF-8; convert it first") from None
    except OSError as error:
        raise ElastiqError(f"text: {path} cannot be read ({error.strerror}); give a text file") from None


def windows(
    content: str, tokenizer: PreTrainedTokenizerBase, window: int, num_windows: int | None, name: str
) -> Tensor:
    """[n, window] int64: `content` as one text without special tokens, cut from its beginning into windows that do not
    overlap; at most `num_windows` of them. `name` stands for the text in messages.

    Raises ElastiqError for a text shorter than one window or a window without a prediction.
    """
    if window < 2:
        raise ElastiqError(f"window={window} predicts nothing; use at least 2")
    if num_windows is not None and num_windows < 1:
        raise ElastiqError(f"num_windows={num_windows} evaluates nothing; use at least 1")
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // window if num_windows is None else min(num_windows, len(ids) // window)
    if not count:
        raise ElastiqError(
            f"text: {name} has {len(ids)} tokens, fewer than one window of {window}; use a longer text or a smaller "
            "window"
        )
    return torch.tensor(ids[: count * window], dtype=torch.int64).reshape(count, window)


def checkpoint_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises ElastiqError if it has none, or one that was altered."""
    if (Path(path) / CHECKSUMS).is_file():
        CheckpointReader(path).check_side_files()
    return load_tokenizer(path)
