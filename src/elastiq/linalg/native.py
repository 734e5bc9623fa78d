"""Which implementation of the inner loops runs: compiled (one path per instruction set) or plain torch.

The environment variable ELASTIQ_PATH or `use` chooses; `torch` forbids compiled code.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  (loaded before the compiled module, so that both use torch's OpenMP runtime)

from ..core import ElastiqError

module: ModuleType | None = None
try:
    module = import_module("._native", __package__)
except ImportError:
    logging.getLogger("elastiq").info("compiled loops are absent; plain torch runs instead, several times slower")

_chosen: str | None = None


def paths() -> tuple[str, ...]:
    """Every path this machine can run, the fastest first; `torch` is always the last."""
    return (*(module.paths() if module else ()), "torch")


def use(path: str | None) -> None:
    """Run `path` from now on; None returns to the default. Raises ElastiqError if this machine cannot run it."""
    global _chosen
    if path is not None and path not in paths():
        raise ElastiqError(f"path {path!r} does not run here; choose one of {', '.join(paths())}")
    _chosen = path


def current() -> str:
    """The path in use: the one chosen by `use`, by ELASTIQ_PATH, or the fastest."""
    path = _chosen or os.environ.get("ELASTIQ_PATH") or paths()[0]
    if path not in paths():
        raise ElastiqError(f"ELASTIQ_PATH={path!r} does not run here; choose one of {', '.join(paths())}")
    return path
