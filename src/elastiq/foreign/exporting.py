"""A checkpoint at one width, or at the widths of a map, in the format of another tool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointReader
from ..checkpoint.publish import write_aside
from ..core import ElastiqError, library_errors
from ..inference.loading import Widths, load, map_widths, plain_widths
from .awq import AWQDirectory
from .compressed import CompressedTensors
from .gguf.exporting import GGUF
from .gptq import GPTQDirectory
from .hf import HuggingFace
from .target import Exported, Target
from .view import View

TARGETS = Target.registry
__all__ = [
    "GGUF",
    "TARGETS",
    "AWQDirectory",
    "CompressedTensors",
    "ExportSummary",
    "GPTQDirectory",
    "HuggingFace",
    "export",
]

MOST_DIFFERENT = 0.5
"""Relative difference of logits beyond which an export does not say what the checkpoint says."""
_CHECKED_TOKENS = 32


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    bits_per_weight: of the quantized matrices as the target stores them. error: squared error that the target's format
    adds, relative, mean over the matrices; worst: the matrix with the largest. logits: relative difference between the
    logits of the export and of the checkpoint at the same widths, on one window of token ids.
    """

    output: str
    target: str
    num_bytes: int
    bits_per_weight: float
    error: float
    worst: dict[str, Any]
    logits: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(path: str | Path, output: str | Path, target: Target, bits: Widths | None = None) -> ExportSummary:
    """Write the checkpoint `path` at `bits` to `output`, as `target` says; `output` appears whole or not at all.

    bits: as for `load`; None is the widest. Before it appears, the export is compared with what was to be written
    (names, shapes, types), opened, and run once beside the checkpoint.
    Raises ElastiqError for a model, a width or a setting the format cannot hold, and for an export that does not agree.
    """
    output = Path(output)
    reader = CheckpointReader(path)
    bits = plain_widths(bits)
    view = View(reader, bits if bits is None or isinstance(bits, int) else map_widths(reader, bits))
    target.check(view)
    done: Exported | None = None
    logits = 0.0

    def write(work: Path) -> None:
        nonlocal done, logits
        done = target.write(view, work)
        _check_arrays(target, work, done)
        logits = _check_forward(target, work, view)

    write_aside(output, target.is_file, write)
    assert done is not None
    files = [output] if output.is_file() else [file for file in output.iterdir() if file.is_file()]
    return ExportSummary(
        output=str(output),
        target=target.name,
        num_bytes=sum(file.stat().st_size for file in files),
        bits_per_weight=done.bits_per_weight,
        error=sum(matrix.error for matrix in done.matrices) / len(done.matrices),
        worst=asdict(done.worst),
        logits=logits,
    )


def _check_arrays(target: Target, work: Path, done: Exported) -> None:
    found = target.found(work)
    for name in sorted(found.keys() | done.arrays.keys()):
        if found.get(name) != done.arrays.get(name):
            raise ElastiqError(
                f"{target.name}: {name} was written as {found.get(name, 'nothing')} instead of "
                f"{done.arrays.get(name, 'nothing')}; this is a bug, please report it"
            )


@torch.inference_mode()
def _check_forward(target: Target, work: Path, view: View) -> float:
    """Relative difference of the logits. Raises ElastiqError where it is beyond all rounding, or not finite."""
    reference = load(view.reader.path, view.widths, verify=False)
    vocabulary = reference.config.get_text_config().vocab_size
    ids = torch.arange(_CHECKED_TOKENS).mul_(7919).remainder_(vocabulary).unsqueeze(0)
    expected = reference(input_ids=ids, use_cache=False).logits.double()
    del reference
    with library_errors(f"{target.name}: what was written cannot be opened", "this is a bug, please report it"):
        model = target.open(work, view)
    logits = model(input_ids=ids, use_cache=False).logits[..., :vocabulary].double()
    difference = float((logits - expected).norm() / expected.norm())
    if not difference <= MOST_DIFFERENT:
        raise ElastiqError(
            f"{target.name}: the logits of what was written differ by {difference:.0%} from those of the checkpoint; "
            "choose a wider level or another type"
        )
    return difference
