"""Run a model from the first decoder block that is not as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


class Prefix:
    """Lets the leading blocks of a model answer from memory, so that only what follows is computed.

    It holds what one block answers for every window, windows x window x hidden floats. blocks: all decoder blocks, in
    the order in which they run. ids: [windows, window], predicted from their token `first` on.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor, first: int = 1) -> None:
        self._model, self._blocks, self._ids = model, tuple(blocks), ids
        self._first = first
        self._count = 0
        self._answers: list[Any] = []

    @cached_property
    def usable(self) -> bool:
        """Whether a block needs nothing of the earlier ones but their answer: tried with all but the last skipped."""
        count = len(self._blocks) - 1
        if count < 1:
            return False
        expected = self._logits(0)
        try:
            with self._skipping(count, self._answer(0, count, 0)):
                return torch.equal(self._logits(0), expected)
        except Exception:  # whatever a model does whose blocks share more than their answers
            return False

    def remember(self, count: int) -> None:
        """Keep what the first `count` blocks answer at the model's present weights."""
        if count != self._count:
            known = self._count if self._count < count else 0
            self._answers = [self._answer(window, count, known) for window in range(len(self._ids))]
            self._count = count

    def logits(self, window: int, count: int) -> Tensor:
        """[window - first, vocabulary] float32; the first `count` blocks, 0 or as many as remembered, are not run."""
        with self._skipping(count, self._answers[window] if count else None):
            return self._logits(window)

    def _logits(self, window: int) -> Tensor:
        return predictions(self._model, self._ids[window], self._first)

    def _answer(self, window: int, count: int, known: int) -> Any:
        """What block `count` (from 1) answers, the first `known` of them not run."""
        handle = self._blocks[count - 1].register_forward_hook(_stop)
        try:
            with self._skipping(known, self._answers[window] if known else None):
                self._logits(window)
        except _Reached as reached:
            return reached.answer
        finally:
            handle.remove()
        raise AssertionError("a decoder block was not run")

    @contextmanager
    def _skipping(self, count: int, answer: Any) -> Iterator[None]:
        skipped = self._blocks[:count]
        for block in skipped:
            block.forward = lambda *args, **kwargs: answer
        try:
            yield
        finally:
            for block in skipped:
                del block.forward


def predictions(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """float32 logits [window - first, vocabulary] for the tokens of one window `ids` from place `first` on."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
    return logits.float()


class _Reached(Exception):
    def __init__(self, answer: Any) -> None:
        self.answer = answer


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(output)
