"""A whole run in minutes: plain rounding through quantize, load and export, so that what would fail fails first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointReader
from ..checkpoint.publish import remove, scratch
from ..core import ElastiqError, Recipe
from ..foreign.exporting import export
from ..foreign.target import Target
from ..inference.loading import load, set_bits
from ..pipeline.run import Progress, quantize
from ..solvers import RoundToNearest

_SAMPLES, _SEQ_LEN = 2, 64
_TOKENS = 32


@dataclass(frozen=True)
class Rehearsed:
    """One thing that was tried. passed: whether it went well; detail: what came out, or the sentence of the refusal."""

    what: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Rehearsal:
    """Everything that was tried, in order; passed: whether a real run would go through."""

    model: str
    rows: tuple[Rehearsed, ...]
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rehearse(
    model: str | Path,
    output: str | Path,
    recipe: Recipe,
    targets: Sequence[Target] = (),
    *,
    bos: bool = True,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Rehearsal:
    """What would happen to `model` on the way to `output` and on to `targets`, tried with rounding to nearest.

    The levels, format and embeddings are those of `recipe`; its solver and tuner are left out and two short windows of
    calibration are taken. The checkpoint is loaded at every level and exported at every level to every target. All of
    it lies beside `output`, in a directory that is removed whatever happens; `output` itself is not touched.
    A target passes if it can hold one of the levels. bos: as for `quantize`.
    """
    rows: list[Rehearsed] = []

    def attempt(what: str, act: Callable[[], str]) -> bool:
        if progress:
            progress(f"rehearsing: {what}", 0, 1)
        begin = time.perf_counter()
        try:
            detail, passed = act(), True
        except ElastiqError as error:
            detail, passed = str(error).replace(str(room), "the rehearsal"), False
        rows.append(Rehearsed(what, passed, detail, time.perf_counter() - begin))
        if progress:
            progress(f"rehearsing: {what}", 1, 1)
        return passed

    with scratch(output, "rehearsal") as work:
        room = work.path
        nested = room / "nested"
        plain = replace(recipe, solver=RoundToNearest(), block_tuner=None, tuner=None)
        passed = attempt("quantize", lambda: _quantize(model, nested, plain, bos, revision, device))
        if passed:
            passed = attempt("load", lambda: _load(nested, recipe.levels, device))
            for target in targets:
                tried = [
                    attempt(f"{target.name}, {level} bits", partial(_export, nested, room, target, level))
                    for level in recipe.levels
                ]
                passed = passed and any(tried)
    return Rehearsal(str(model), tuple(rows), passed)


def _quantize(
    model: str | Path, nested: Path, recipe: Recipe, bos: bool, revision: str | None, device: str
) -> str:
    summary = quantize(
        model, nested, recipe, num_samples=_SAMPLES, seq_len=_SEQ_LEN, bos=bos, revision=revision, device=device
    )
    return f"{summary.matrices} matrices"


@torch.inference_mode()
def _load(nested: Path, levels: Sequence[int], device: str) -> str:
    """Every level read and run once."""
    model = load(nested, levels[-1], device=device)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_TOKENS, device=device).mul_(7919).remainder_(vocabulary).unsqueeze(0)
    for level in levels:
        set_bits(model, level)
        if not math.isfinite(float(model(input_ids=ids, use_cache=False).logits.float().abs().max())):
            raise ElastiqError(f"the logits at {level} bits are not finite; inspect the model's weights")
    files = sum(file.stat().st_size for file in nested.iterdir())
    return f"{', '.join(map(str, CheckpointReader(nested).available))} bits, {files / 1e6:.1f} MB"


def _export(nested: Path, room: Path, target: Target, bits: int) -> str:
    summary = export(nested, room / "exported", target, bits)
    remove(Path(summary.output))
    kind = "" if target.name == summary.worst["stored_as"] else f" as {summary.worst['stored_as']}"
    return f"{summary.bits_per_weight:.2f} bits per weight{kind}, logits differ by {summary.logits:.1%}"
