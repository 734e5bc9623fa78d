"""What was imported, as its user will load it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..core import ElastiqError, library_errors


def silently(source: Path, read: Callable[[], Any]) -> Any:
    """What transformers reads of `source`, without its reports and progress bars.

    Raises ElastiqError where it raises anything.
    """
    level = logging.get_verbosity()
    try:
        logging.set_verbosity_error()
        what = f"{source}: transformers cannot read it"
        with library_errors(what, REMEDY), contextlib.redirect_stderr(io.StringIO()):
            return read()
    finally:
        logging.set_verbosity(level)


def read_back(
    source: Path, directory: Path, device: str, says_nothing: Callable[[str], bool] = lambda name: False
) -> PreTrainedModel:
    """The model in `directory`, into which `source` was imported, in the types of its arrays.

    device: "meta" to read no weights. says_nothing: whether an array may be left unread.
    Raises ElastiqError naming the arrays that no parameter takes and the parameters that no array makes.
    """
    model, report = silently(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", device_map=device, use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True,
        ),
    )  # fmt: skip
    unread = sorted(name for name in report["unexpected_keys"] if not says_nothing(name))
    if unread:
        raise ElastiqError(f"{source}: nothing of {type(model).__name__} takes {shown(unread)}; {REMEDY}")
    lacking = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    if lacking:
        raise ElastiqError(
            f"{source}: no array of it makes {shown(lacking)} of {type(model).__name__}; copy it again, or {REMEDY}"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def shown(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


REMEDY = "take the model's own directory"
"""What to do with a file of which something would be lost."""
