"""What a tokenizer makes of a text, and how a window of it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core import ElastiqError
from .files import require_characters

_PROBE = "The 1st text, and another."


@dataclass(frozen=True)
class Windows:
    """Windows of one text. ids: int64 [n, window]. beginning: the tokens of no text that each of them starts with."""

    ids: Tensor
    beginning: tuple[int, ...] = ()

    @staticmethod
    def of(ids: Sequence[int], beginning: tuple[int, ...], window: int, most: int | None = None) -> Windows:
        """`ids` cut from their start into windows that do not overlap, at most `most` of them, each behind `beginning`;
        what is left over is dropped. `window` tokens are both together, and more than `beginning` has."""
        room = window - len(beginning)
        count = len(ids) // room if most is None else min(most, len(ids) // room)
        text = torch.tensor(ids[: count * room], dtype=torch.long).view(count, room)
        rows = torch.tensor(beginning, dtype=torch.long).expand(count, len(beginning))
        return Windows(torch.cat([rows, text], dim=1), beginning)

    @property
    def first(self) -> int:
        """Place in a window of the first token whose prediction counts: one of the text, with something before it."""
        return max(1, len(self.beginning))


def beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer puts in front of every text by its own post-processor: Llama's <s>, often none.

    Models that are trained with them fall apart without. Raises ElastiqError for a tokenizer whose special tokens do
    not stand around the text.
    """
    return _around(tokenizer)[0]


def ending(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that it puts behind every text, which no window has: the text goes on."""
    return _around(tokenizer)[1]


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plain, whole = (_encode(_PROBE, tokenizer, special) for special in (False, True))
    if whole == plain:
        return (), ()
    for count in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[count : count + len(plain)] == plain:
            return tuple(whole[:count]), tuple(whole[count + len(plain) :])
    raise ElastiqError(
        "tokenizer: its special tokens do not stand around a text, so that how a text begins is not known; "
        "cut windows without them (--no-bos)"
    )


def begins(beginning: Sequence[int]) -> str:
    """How windows begin, in words."""
    if not beginning:
        return "no special tokens"
    tokens = f"token{'s' if len(beginning) > 1 else ''} {', '.join(map(str, beginning))}"
    return f"the tokenizer's {tokens} before every window"


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, where: str, start: tuple[int, ...] = ()) -> list[int]:
    """Ids of the text alone, without the tokens `start` if it spells them itself, as a chat template may.

    where: stands for the text in messages. Raises ElastiqError for what is no text.
    """
    require_characters(text, where)
    ids = _encode(text, tokenizer, special=False)
    return ids[len(start) :] if tuple(ids[: len(start)]) == start else ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def check_ids(model: Any, ids: Tensor, what: str) -> None:
    """Raises ElastiqError for a token id that the model's embedding has no row for. what: stands for the ids in
    messages."""
    rows: int = model.get_input_embeddings().num_embeddings
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= rows:
        raise ElastiqError(
            f"{what}: the token id {least if least < 0 else most} is not among the {rows} rows of the model's "
            "embedding; use the model's own tokenizer"
        )
