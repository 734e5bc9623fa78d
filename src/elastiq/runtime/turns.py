"""Calls of a model and changes of its widths take turns."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..core import ElastiqError

_TURNS = "elastiq_turns"
"""Attribute of a model that holds its `Turns`."""


class Turns:
    """Any number of calls at once, or one change alone.

    A change waits for the calls that run, calls that come later wait for it. A copy or a pickle begins anew.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: Counter[int] = Counter()  # how deep each thread is within calls
        self._changes: list[int] = []  # threads that change or wait to

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call; within another call or a change of the same thread it is part of that one."""
        here = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: not self._changes or here in self._changes or here in self._calls)
            self._calls[here] += 1
        try:
            yield
        finally:
            with self._condition:
                self._calls[here] -= 1
                if not self._calls[here]:
                    del self._calls[here]
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """A change of widths. Raises ElastiqError within a call of the same thread, which would wait for itself."""
        here = threading.get_ident()
        with self._condition:
            if here in self._calls or here in self._changes:
                raise ElastiqError("set_bits: this thread is within a call of the model; set widths after it")
            self._changes.append(here)
            self._condition.wait_for(lambda: self._changes[0] == here and not self._calls)
        try:
            yield
        finally:
            with self._condition:
                self._changes.remove(here)
                self._condition.notify_all()

    def __reduce__(self) -> Any:
        return Turns, ()


def take_turns(model: nn.Module) -> None:
    """Let calls of `model` exclude `changing_widths` of it; calls that torch.compile compiled do not."""
    setattr(model, _TURNS, Turns())
    module: Any = model
    module.forward = MethodType(_in_turn(type(model).forward), model)


@contextmanager
def changing_widths(model: nn.Module) -> Iterator[None]:
    """No call of `model` runs within; as for `Turns.change`."""
    turns = getattr(model, _TURNS, None)
    if turns is None:  # not loaded by this library, which then guards no calls of it
        yield
        return
    with turns.change():
        yield


def _in_turn(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(self, *args, **kwargs)
        with getattr(self, _TURNS).call():
            return plain(self, *args, **kwargs)

    return forward
