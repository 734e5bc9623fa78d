"""What libraries raise becomes one sentence, whatever its type."""

from __future__ import annotations

import pytest
import torch

from elastiq.core import ElastiqError, first_line, library_errors


class Panic(BaseException):
    """As compiled Rust raises it."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no such kind\nand a page of advice"), "no such kind"),
        (ValueError("\n  Validation error for field 'dtype':\n    of another type\n"),
         "Validation error for field 'dtype': of another type"),
        (KeyError("linear"), "KeyError: 'linear'"),
        (AttributeError(), "AttributeError"),
        (RuntimeError("x" * 1000), "x" * 300 + "..."),
        (Panic("unwrap on None"), "unwrap on None"),
    ],
)  # fmt: skip
def test_one_sentence_of_whatever_is_raised(error: BaseException, reason: str) -> None:
    assert first_line(error) == reason
    with pytest.raises(ElastiqError) as caught, library_errors("here: it fails", "do that"):
        raise error
    assert str(caught.value) == f"here: it fails ({reason}); do that"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ElastiqError("ours"), KeyboardInterrupt(), SystemExit(1), MemoryError(), torch.OutOfMemoryError()]
)
def test_what_is_not_a_library_s_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, library_errors("here: it fails", "do that"):
        raise error
    assert caught.value is error
