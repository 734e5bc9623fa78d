"""The protocol: how a text file becomes windows of tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..checkpoint import CheckpointReader
from ..checkpoint.names import CHECKSUMS
from ..core import ElastiqError
from ..models import load_tokenizer
from .tokens import Windows, beginning, tokenize


def windows(
    content: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    num_windows: int | None,
    name: str,
    *,
    bos: bool = True,
) -> Windows:
    """`content` as one text, cut from its beginning into windows of `window` tokens that do not overlap; at most
    `num_windows` of them. Each starts as the tokenizer starts a text, and `window` counts that; with `bos` false it
    is left out. `name` stands for the text in messages.

    Raises ElastiqError for a text shorter than one window or a window without a prediction.
    """
    start = beginning(tokenizer) if bos else ()
    least = max(2, len(start) + 1)
    if window < least:
        raise ElastiqError(f"window={window} predicts nothing; use at least {least}")
    if num_windows is not None and num_windows < 1:
        raise ElastiqError(f"num_windows={num_windows} evaluates nothing; use at least 1")
    ids = tokenize(content, tokenizer, f"text: {name}", start)
    cut = Windows.of(ids, start, window, num_windows)
    if not len(cut.ids):
        raise ElastiqError(
            f"text: {name} has {len(ids)} tokens, fewer than one window of {window}; use a longer text or a smaller "
            "window"
        )
    return cut


def checkpoint_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises ElastiqError if it has none, or one that was altered."""
    if (Path(path) / CHECKSUMS).is_file():
        CheckpointReader(path).check_side_files()
    return load_tokenizer(path)
