"""What a run would take, from headers alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core import Format, Recipe, Site, plain_count
from ..formats import Integer
from ..models import Layout, ModelSource, build_skeleton, discover
from ..recipes import nested
from ..solvers import BitStack
from .tuning import ANSWER_BYTES, estimate

STATES_IN_MEMORY = 2**30
"""Bytes of hidden states beyond which they go to a file."""
DEFAULT_RECIPE = nested()
_BESIDE = ("transform", "split", "compensator")
PROCESS_BYTES = 450_000_000
"""Resident size of the process before it has read anything."""


@dataclass(frozen=True)
class Plan:
    """What a run would do; nothing is read but headers.

    levels as in `quantize.Summary`, without the error; what the steps named in `beside` store comes on top of them.
    peak_memory and seconds are estimates, disk is what the run needs free while it works (the checkpoint twice, for a
    moment, hidden states that memory does not hold, and the full model's answers).
    """

    model: str
    matrices: list[dict[str, Any]]
    skipped: dict[str, str]
    levels: dict[int, dict[str, float]]
    beside: list[str]
    bytes_full: int
    disk: int
    peak_memory: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    num_samples: int = 128,
    seq_len: int = 512,
    revision: str | None = None,
) -> Plan:
    """What `quantize` would do with these arguments: matrices, sizes, memory, time. Reads no weight, writes nothing."""
    num_samples, seq_len = plain_count(num_samples, "num_samples"), plain_count(seq_len, "seq_len")
    source = ModelSource(model, revision)
    skeleton = build_skeleton(source, torch.float32)
    return plan_of(source, skeleton, discover(skeleton), recipe or DEFAULT_RECIPE, num_samples, seq_len)


def plan_of(source: ModelSource, skeleton: Any, layout: Layout, recipe: Recipe, num_samples: int, seq_len: int) -> Plan:
    """The plan for a model whose structure is known; `skeleton` may be on meta."""
    sites = layout.sites + (layout.outer if recipe.embeddings else ())
    total = sum({id(p): p.numel() for p in skeleton.parameters()}.values())
    base = total - sum(site.num_weights for site in sites)
    weights = sum(site.num_weights for site in sites)
    planes = sum(site.shape[0] * -(-site.shape[1] // 8) for site in sites)
    scales = sum(site.shape[0] * recipe.format.overhead(site.shape[1]) for site in sites) // 8
    held = scales + sum(site.shape[0] * _read_scales(recipe.format, site.shape[1]) for site in sites) // 8
    levels: dict[int, dict[str, float]] = {}
    for index, level in enumerate(recipe.levels):
        levels[level] = {
            "bits_per_weight": 8 * (planes * level + scales) / weights,
            "bytes_in_memory": 4 * base + planes * level + held * (index + 1),
            "bytes_on_disk": 2 * base + planes * level + scales * (index + 1),
        }
    states = 4 * num_samples * seq_len * skeleton.config.get_text_config().hidden_size
    memory = _memory_estimate(layout, recipe, states)
    disk = 2 * int(levels[recipe.levels[-1]]["bytes_on_disk"]) + 2 * max(0, states - STATES_IN_MEMORY // 2)
    seconds = _flops(layout, sites, recipe, num_samples * seq_len) / _matmul_rate(torch.float32)
    if recipe.block_tuner is not None:
        tuner, windows = recipe.block_tuner, num_samples
        calls = sum(tuner.calls(windows, group) for group in tuner.groups(recipe.levels))
        tokens = seq_len * min(tuner.batch, windows) * calls
        seconds += 6.0 * tokens * sum(site.num_weights for site in layout.sites) / _matmul_rate(torch.float32)
        memory += 40 * max(sum(site.num_weights for site in layout.at(b)) for b in range(len(layout.blocks)))
    if recipe.tuner is not None:
        tuning, flops = estimate(skeleton, sites, recipe.levels, recipe.tuner, seq_len)
        memory = max(memory, PROCESS_BYTES + tuning)
        seconds += sum(count / _matmul_rate(precision) for precision, count in flops.items())
        disk += ANSWER_BYTES * seq_len * recipe.tuner.windows
    return Plan(
        model=str(source.path),
        matrices=[{"name": s.name, "role": s.role, "block": s.block, "shape": list(s.shape)} for s in sites],
        skipped=layout.skipped,
        levels=levels,
        beside=[step.name for step in recipe.steps if step.slot in _BESIDE or isinstance(step, BitStack)],
        bytes_full=2 * total,
        disk=disk,
        peak_memory=memory,
        seconds=seconds,
    )


def _read_scales(format: Format, in_features: int) -> int:
    """Bits per output row and level of the half-precision scales that a model holds beside those stored otherwise."""
    if not isinstance(format, Integer) or format.scales == "half":
        return 0
    return replace(format, scales="half").overhead(in_features)


def _memory_estimate(layout: Layout, recipe: Recipe, states: int) -> int:
    """Bytes: the process, its largest block with its Hessians, the hidden states and one matrix being solved."""
    blocks = []
    for block in range(len(layout.blocks)):
        sites = layout.at(block)
        inputs = {site.input_id: site.shape[1] for site in sites}
        width, rows = max(s.shape[1] for s in sites), max(min(s.shape[0], 1024) for s in sites)
        hessians = sum(4 * n * n for n in inputs.values()) + 32 * width * width if "hessian" in recipe.needs else 0
        blocks.append(4 * sum(s.num_weights for s in sites) + hessians + 24 * width * rows * len(recipe.levels))
    return PROCESS_BYTES + max(blocks) + 2 * min(states, STATES_IN_MEMORY // 2)


def _flops(layout: Layout, sites: Sequence[Site], recipe: Recipe, tokens: int) -> float:
    """Multiplications and additions of the forward passes, the Hessians and the solver, roughly."""
    passes = getattr(recipe.solver, "passes", 0) + 1
    needs_hessian = "hessian" in recipe.needs
    flops = 0.0
    for site in sites:
        flops += 2.0 * tokens * site.num_weights
        if needs_hessian:
            levels = len(recipe.levels) if recipe.solver.name == "nested" else 1
            flops += site.num_weights * site.shape[1] * (4.0 * passes * levels + 2.0 * len(recipe.levels))
    inputs = {site.input_id: site.shape[1] for site in layout.sites if site.expert is None}
    return flops + (sum(2.0 * tokens * n * n + 4.0 * n**3 for n in inputs.values()) if needs_hessian else 0.0)


def _matmul_rate(dtype: torch.dtype) -> float:
    """Useful operations per second of this machine: a matrix product measured now, and the share of it seen in runs."""
    share = 0.4 if dtype == torch.float32 else 0.1
    x = torch.ones(768, 768, dtype=dtype)
    x @ x
    begin = time.perf_counter()
    for _ in range(8):
        x @ x
    return share * 8 * 2 * 768**3 / (time.perf_counter() - begin)
