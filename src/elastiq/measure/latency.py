"""How long one token takes through every matrix at every level, on this machine, with the kernels that run here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..allocate import Table
from ..checkpoint import CheckpointReader
from ..checkpoint.files import json_bytes, read_json, replace_durably, write_durably
from ..checkpoint.names import CONFIG
from ..core import ElastiqError
from ..inference.loading import load, set_bits
from ..linalg import native
from ..runtime import StoredMatrix, TiedHead, nested_matrices

Progress = Callable[[str, int, int], None]

_ROUNDS = 7
_LEAST_SECONDS = 2e-3
"""A round repeats what it times until it takes this long. The fastest round counts: what else runs on the machine only
ever adds."""


def latency_table(
    path: str | Path,
    *,
    untie: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Table:
    """The checkpoint's table with seconds per token, from times measured on this machine: one token through one matrix
    of every shape at every level, and through the whole model for what is left.

    Times are kept in the user's cache, under a fingerprint of the machine and the software, and measured once. Raises
    ElastiqError for mixtures of experts, whose time depends on the text.
    """
    reader = CheckpointReader(path)
    report = progress or (lambda what, done, total: None)
    file = _cache_file(reader, device)
    if not file.is_file():
        content = json_bytes(_measure(reader, device, report), file.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(file, lambda temporary: write_durably(temporary, [content]))
    data = read_json(file)
    try:
        rest = float(data["rest"])
        times = {(tuple(map(int, row["shape"])), int(row["bits"])): float(row["seconds"]) for row in data["times"]}
    except (KeyError, TypeError, ValueError):
        raise ElastiqError(f"{file}: not a table of times; remove it") from None
    return Table.of(reader, untie, times=times, base_seconds=rest)


def machine(device: str) -> dict[str, Any]:
    """What a time depends on besides the checkpoint."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        name = next(models, name)
    return {
        "processor": name,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "path": native.current(),
        "torch": torch.__version__,
        "elastiq": version("elastiq"),
    }


def _cache_file(reader: CheckpointReader, device: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    described = json.dumps([machine(device), reader.digests[CONFIG], reader.planes], sort_keys=True)
    return root / "elastiq" / "latency" / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"


@torch.inference_mode()
def _measure(reader: CheckpointReader, device: str, report: Progress) -> dict[str, Any]:
    matrices = reader.manifest.matrices
    if any(matrix.fused for matrix in matrices.values()):
        raise ElastiqError("latency: of a mixture of experts it depends on the text and is not measured; use --size")
    model: Any = load(reader.path, device=device)
    first = {matrix.shape: name for name, matrix in reversed(matrices.items())}
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    rows: list[dict[str, Any]] = []
    rests = []
    for index, bits in enumerate(reader.levels):
        report("timing kernels", index, len(reader.levels))
        set_bits(model, bits)
        taken = {shape: _seconds_of(model, matrices[name]) for shape, name in first.items()}
        rows += [{"shape": list(shape), "bits": bits, "seconds": seconds} for shape, seconds in taken.items()]
        whole = _seconds(lambda: model(input_ids=token, use_cache=False))
        rests.append(whole - sum(taken[matrix.shape] for matrix in matrices.values()))
    report("timing kernels", len(reader.levels), len(reader.levels))
    return {"machine": machine(device), "rest": max(0.0, statistics.median(rests)), "times": rows}


def _seconds_of(model: nn.Module, stored: StoredMatrix) -> float:
    """One token through a matrix; through the head that an embedding is tied to, where there is one."""
    module: nn.Module = nested_matrices(model)[stored.name]
    if stored.role == "embedding":
        heads = [m for m in model.modules() if isinstance(m, TiedHead)]
        if not heads:
            return 0.0
        module = heads[0]
    like = nested_matrices(model)[stored.name]._like
    x = torch.randn(1, 1, stored.in_features, device=like.device, dtype=like.dtype)
    return _seconds(lambda: module(x))


def _seconds(run: Callable[[], object]) -> float:
    run()
    repeats = 1
    rounds: list[float] = []
    while len(rounds) < _ROUNDS:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if seconds < _LEAST_SECONDS and not rounds:
            repeats *= 2
            continue
        rounds.append(seconds / repeats)
    return min(rounds)
