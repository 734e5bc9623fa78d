"""Nothing silently wrong: what is about to be written is read as a user would read it, and compared with the model."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as logs

from ..checkpoint import CheckpointReader, CheckpointWriter
from ..checkpoint.files import json_bytes, read_config, spelled
from ..checkpoint.names import BASE, CONFIG, plane_file
from ..core import ElastiqError, library_errors
from ..inference.loading import load
from ..models import ModelSource, give_back_memory
from .stream import BlockStream

log = logging.getLogger("elastiq")

_LOGITS = "logits"
_FACTOR = 6.0
"""How far errors may add up beyond what those of single matrices say. Measured on tiny random models they reach 1.7
times that, on trained ones a third; what this guard is for (a lost factor or bias) is 10 to 1000 times it."""
_SIZE = 8.0
"""How much larger or smaller logits may become at any width: few bits explain every distance, but no zeros."""
_ARITHMETIC = 0.02
"""Gap that 16-bit parts and activations in fixed point may make."""
_NOTHING = 1e-6
"""Part of logits that float32 makes where all tokens have the same: no distance is relative to that."""

_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Checked:
    """What the guard found. gap: of the logits, relative to the model's own, the larger of two loaders. bound: what the
    errors of the matrices explain. seconds: it took. skipped: why it was not done."""

    gap: float | None
    bound: float | None
    seconds: float
    skipped: str | None = None


def check_config(source: ModelSource, config: Mapping[str, Any]) -> None:
    """Raises ElastiqError unless `config`, written as config.json, is read back as the model's own configuration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        path.write_bytes(json_bytes(spelled(dict(config)), CONFIG))
        what = f"{source.path}: its config.json cannot be read back once it is written"
        with library_errors(what, "load the model with transformers and save its configuration again"):
            found = [
                AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True),
                AutoConfig.for_model(**read_config(path)),
            ]
    wanted = _entries(source.config)
    for said, part in ((config, wanted), (config.get("text_config"), wanted.get("text_config"))):
        if isinstance(said, Mapping) and isinstance(part, dict) and _TIED in said:
            part[_TIED] = said[_TIED]  # a head of its own under a configuration that ties is not called tied
    for each in found:
        entries = _entries(each)
        if name := next((n for n in wanted.keys() | entries.keys() if wanted.get(n) != entries.get(n)), None):
            raise ElastiqError(
                f"{source.path}: {name} of config.json is {wanted.get(name)!r} and would be read back as "
                f"{entries.get(name)!r}; load the model with transformers and save its configuration again"
            )


def _entries(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration's entries, apart from those that say where it comes from."""
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "auto_map")}


def keep_logits(writer: CheckpointWriter, stream: BlockStream) -> None:
    """Keep, durably, the model's logits of the first calibration window. The stream is after the last block."""
    logits = stream.first_logits().float().cpu().numpy()

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, logits)

    writer.write_side_file(_LOGITS, write)


def check_result(writer: CheckpointWriter, ids: Tensor, dtype: torch.dtype, result: Path, energies: bool) -> Checked:
    """Load the finished checkpoint in `result` both ways, at its widest, and compare the first window's logits with
    those kept. ids: the calibration's. dtype: of the arithmetic in which they were computed. energies: whether those of
    the level table are parts of a block's output.

    It takes the memory of a user's load, and says so where there is not enough. Raises ElastiqError if the logits are
    further apart than the errors of the matrices explain.
    """
    begin = time.perf_counter()
    kept = writer.side_file(_LOGITS)
    if not kept.is_file():
        return _skipped("the blocks were finished by a version of elastiq that kept no logits")
    reader = CheckpointReader(result, verify=False)
    needed, free = _bytes_needed(reader, kept), _free_memory()
    if free is not None and needed > free:
        return _skipped(f"loading it takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free")
    wanted = torch.from_numpy(np.load(kept, allow_pickle=False))
    if not bool(torch.isfinite(wanted).all()):
        return _skipped("the model's own logits are not finite on the first calibration window")
    if float((wanted - wanted.mean(dim=-1, keepdim=True)).norm()) <= _NOTHING * float(wanted.norm()):
        return _skipped("the model's own logits are all equal on the first calibration window")
    level = reader.levels[-1]
    bound = _FACTOR * math.sqrt(_explained(reader.table, level, energies)) + _ARITHMETIC + 8 * torch.finfo(dtype).eps
    gap = 0.0
    for name, loader in (("elastiq.load", _elastiq), ("from_pretrained", _transformers)):
        model = loader(result, level)
        logits = _first_logits(model, ids)
        found, size = relative_gap(logits, wanted), float(logits.norm() / wanted.norm().clamp_min(1e-30))
        architecture = type(model).__name__
        del model
        give_back_memory()
        if not (found <= bound and 1 / _SIZE <= size <= _SIZE):
            raise ElastiqError(
                f"{writer.output}: the finished checkpoint was not published, because its {architecture}, loaded by "
                f"{name} at {level} bits, has logits {found:.0%} from the model's own ({size:.2g} times as large) "
                f"where the errors of its matrices explain {bound:.0%}; please report this fault of elastiq "
                f"(finished blocks are kept in {writer.work})"
            )
        gap = max(gap, found)
    seconds = time.perf_counter() - begin
    log.info("loaded at %d bits, logits are %.2g from the model's own (at most %.2g); checked in %.1f s",
             level, gap, bound, seconds)  # fmt: skip
    return Checked(gap, bound, seconds)


def relative_gap(found: Tensor, wanted: Tensor) -> float:
    """Distance of logits [..., vocabulary], each position's mean taken off, relative to the norm of `wanted`.

    It is the median over the positions: where a router chooses another expert, one is far off and nothing is wrong.
    """
    found, wanted = (logits - logits.mean(dim=-1, keepdim=True) for logits in (found, wanted))
    gaps = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    return float(gaps.median()) if bool(gaps.isfinite().all()) else math.inf


def _explained(rows: Sequence[Mapping[str, Any]], level: int, energies: bool) -> float:
    """Squared relative error of the hidden states that the errors of the matrices add up to. An error counts by the
    part of its block's output that the matrix makes, wholly where that is not known; an error that tuning left unknown
    is that of plain rounding."""
    total = 0.0
    for row in rows:
        error = row["levels"][str(level)]["error"]
        energy = row["energy"] if energies else None
        total += (3.0 * 4.0**-level if error is None else error) * (1.0 if energy is None else energy)
    return total


def _elastiq(path: Path, bits: int) -> PreTrainedModel:
    return load(path, bits, verify=False)


def _transformers(path: Path, bits: int) -> PreTrainedModel:
    """At the widest, which transformers takes by itself. Its progress bar is not ours to show."""
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    finally:
        if shown:
            logs.enable_progress_bar()
    return model


@torch.inference_mode()
def _first_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids[:1], use_cache=False).logits.float()


def _skipped(reason: str) -> Checked:
    log.warning("the finished checkpoint was not compared with the model: %s", reason)
    return Checked(None, None, 0.0, reason)


def _bytes_needed(reader: CheckpointReader, logits: Path) -> int:
    """What a load in float32 holds, with the logits of both."""
    planes = sum((reader.path / plane_file(plane)).stat().st_size for plane in range(1, reader.planes + 1))
    return planes + 2 * (reader.path / BASE).stat().st_size + 4 * logits.stat().st_size


def _free_memory() -> int | None:
    """Bytes that this machine, or the group of processes this one is in, can still give; None where it does not say."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text().strip()
        free += [int(most) - int(used)] if most != "max" else []
    except (OSError, ValueError):
        pass
    return min(free, default=None)
