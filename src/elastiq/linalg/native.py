"""Which implementation of the compiled loops runs: one path per instruction set, or plain torch.

The environment variable ELASTIQ_PATH or `use` chooses; `torch` forbids compiled code. The names that go beyond
`avx512` differ in products with bit planes only: the solvers' loops run as `columns_path` says.
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
    logging.getLogger("elastiq").warning(
        "compiled loops are absent; plain torch runs instead, several times slower; install with a C++ compiler"
    )

_paths: tuple[str, ...] = (*(module.paths() if module else ()), "torch")
_chosen: str | None = os.environ.get("ELASTIQ_PATH")


def paths() -> tuple[str, ...]:
    """Every path this machine can run, the fastest first; `torch` is always the last."""
    return _paths


def use(path: str | None) -> None:
    """Run `path` from now on; None returns to ELASTIQ_PATH or the default.

    Raises ElastiqError if this machine cannot run it.
    """
    global _chosen
    if path is not None and path not in _paths:
        raise ElastiqError(f"path {path!r} does not run here; choose one of {', '.join(_paths)}")
    _chosen = path or os.environ.get("ELASTIQ_PATH")


def current() -> str:
    """The path in use: the one chosen by `use`, by ELASTIQ_PATH, or the fastest."""
    path = _chosen or _paths[0]
    if path not in _paths:
        raise ElastiqError(f"ELASTIQ_PATH={path!r} does not run here; choose one of {', '.join(_paths)}")
    return path


def columns_path() -> str:
    """The path of the solvers' loops, on which the bytes of a checkpoint depend."""
    path = current()
    return "avx512" if path == "amx" or path.startswith("avx512") else path
