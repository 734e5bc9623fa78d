"""The protocol: how a text file becomes windows of tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..core import ElastiqError
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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint. Raises ElastiqError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ElastiqError(f"{path}: its tokenizer cannot be loaded ({reason}); copy its files there") from None
