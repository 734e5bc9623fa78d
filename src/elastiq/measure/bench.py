"""A checkpoint's model with dense weights, whose matrices can be lowered and raised one by one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import CheckpointReader
from ..core import Damage, Width
from ..evaluate import check_windows, load_full
from ..inference.loading import load
from ..runtime import NestedEmbedding, NestedLinear, NestedMatrix, nested_matrices
from ..text import Windows, read_text
from ..text.evaluation import checkpoint_tokenizer, windows
from .prefix import Prefix, predictions

_KL_ROWS = 512
"""Positions whose log-probabilities are compared at a time."""


def read_windows(
    path: str | Path, text: str | Path, window: int, num_windows: int | None, bos: bool
) -> tuple[Windows, dict[str, Any]]:
    """Windows of a text as the checkpoint's tokenizer cuts it, and what identifies them. bos: as for `evaluate`."""
    content, name = read_text(text, "text"), Path(text).name
    cut = windows(content, checkpoint_tokenizer(path), window, num_windows, name, bos=bos)
    facts = {
        "name": name,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "windows": len(cut.ids),
        "window": window,
        **({"beginning": list(cut.beginning)} if cut.beginning else {}),
    }
    return cut, facts


class Bench:
    """The model of a checkpoint at its widest, each matrix decoded once into a dense float32 weight beside its planes.

    `damage` reads any matrices at other widths and compares the predictions with a reference, the widest model or the
    16-bit model `against`, whose log-probabilities are kept: windows x window x vocabulary floats. Blocks before the
    first matrix that is read otherwise are not run again.
    ids: [windows, window] of `text`. first: place in a window of the first token whose prediction counts. blocks:
    index of the decoder block of every matrix, -1 outside of them.
    """

    def __init__(
        self,
        path: str | Path,
        text: str | Path,
        *,
        window: int = 512,
        num_windows: int | None = 4,
        bos: bool = True,
        device: str = "cpu",
        against: str | Path | None = None,
    ) -> None:
        self.reader = CheckpointReader(path)
        cut, self.text = read_windows(path, text, window, num_windows, bos)
        self.ids, self.first = cut.ids.to(device), cut.first
        self.model: Any = load(path, device=device, dtype=torch.float32)
        check_windows(self.model, cut, self.text["name"])
        self.nested = nested_matrices(self.model)
        self._widest: dict[str, Width] = {name: matrix.bits for name, matrix in self.nested.items()}
        self._current = dict(self._widest)
        for name, matrix in self.nested.items():
            self._make_dense(name, matrix)
        self._against = against
        self._device = device
        self.blocks = {row["tensor"]: int(row["block"]) for row in self.reader.table}
        self._prefix = Prefix(self.model, self._decoder_blocks(), self.ids, self.first)

    def parameter(self, name: str) -> nn.Parameter | None:
        """The dense weight of a matrix ([experts, out, in] for experts), None for an embedding, which stays nested."""
        matrix = self.nested[name]
        return None if isinstance(matrix, NestedEmbedding) else self.model.get_parameter(f"{name}.weight")

    def decode(self, name: str, bits: Width) -> Tensor:
        """float32 values at a width, in the shape that is stored."""
        if isinstance(bits, str):
            digits = torch.tensor([int(digit) for digit in bits])
            mixed = self.decode(name, int(digits[0]))
            for width in digits.unique().tolist():
                members = digits == width
                mixed[members] = self.decode(name, width)[members]
            return mixed
        matrix = self.nested[name]
        before, matrix.bits = matrix.bits, bits
        try:
            return matrix.dense()
        finally:
            matrix.bits = before

    def damage(self, widths: Mapping[str, Width]) -> Damage:
        """What reading the matrices of `widths` so, and all others at the widest, does to the predictions."""
        reference, reference_nll = self.reference
        changed = {name: bits for name, bits in widths.items() if bits != self._widest[name]}
        if not changed and self._against is None:
            return Damage(0.0, 0.0)
        kl, nll, count = 0.0, 0.0, 0
        with torch.inference_mode():
            same = self._unchanged_blocks(changed)
            self._set(changed)
            for index, ids in enumerate(self.ids):
                log_q = F.log_softmax(self._prefix.logits(index, same), dim=-1)
                nll -= float(log_q.gather(1, ids[self.first :, None]).sum(dtype=torch.float64))
                for first in range(0, len(log_q), _KL_ROWS):
                    log_p = reference[index, first : first + _KL_ROWS]
                    part = log_p.exp() * (log_p - log_q[first : first + _KL_ROWS])
                    kl += float(part.sum(dtype=torch.float64))
                count += len(log_q)
        return Damage(max(0.0, kl / count), nll / count - reference_nll)

    @contextmanager
    def widest(self) -> Iterator[nn.Module]:
        """The model with every matrix at its widest."""
        self._set({})
        yield self.model

    @cached_property
    def reference(self) -> tuple[Tensor, float]:
        """Log-probabilities [windows, window - first, vocabulary] and their mean loss."""
        self._set({})
        model = self.model
        if self._against is not None:
            model = load_full(self._against, None, self._device, torch.float32)
        with torch.inference_mode():
            logits = (predictions(model, ids, self.first) for ids in self.ids)
            kept = torch.stack([F.log_softmax(part, dim=-1) for part in logits])
            return kept, -float(kept.gather(2, self.ids[:, self.first :, None]).mean(dtype=torch.float64))

    def _unchanged_blocks(self, changed: Mapping[str, Width]) -> int:
        """How many leading blocks are as in the widest model; what they answer there is remembered."""
        count = min((self.blocks[name] for name in changed), default=0)
        if count < 1 or not self._prefix_usable:
            return 0
        self._set({})
        self._prefix.remember(count)
        return count

    @cached_property
    def _prefix_usable(self) -> bool:
        self._set({})
        return self._prefix.usable

    def _decoder_blocks(self) -> list[nn.Module]:
        """All blocks in their order; none where matrices of several lists of blocks are quantized."""
        names = {block_name(name, block) for name, block in self.blocks.items() if block >= 0}
        parents = {str(name).rpartition(".")[0] for name in names}
        return list(self.model.get_submodule(parents.pop()).children()) if len(parents) == 1 else []

    @torch.no_grad()
    def _set(self, widths: Mapping[str, Width]) -> None:
        for name, bits in (self._widest | dict(widths)).items():
            if bits == self._current[name]:
                continue
            parameter = self.parameter(name)
            if parameter is None:
                self.nested[name].bits = bits
            else:
                parameter.copy_(self.decode(name, bits))
            self._current[name] = bits

    def _make_dense(self, name: str, matrix: NestedMatrix) -> None:
        """Put an ordinary module in the place of a nested one; embeddings stay nested."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        if isinstance(matrix, NestedLinear):
            linear = nn.Linear(matrix.in_features, matrix.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(matrix.dense(), requires_grad=False)
            linear.register_parameter("bias", matrix.bias)
            setattr(parent, leaf, linear)
        elif matrix.stored.fused:
            setattr(parent, leaf, _DenseExperts(matrix))


class _DenseExperts(nn.Module):
    """Stands where `NestedExperts` stood; weight: [experts, out, in] whichever way they are asked for."""

    def __init__(self, matrix: NestedMatrix) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix.dense(), requires_grad=False)
        self._transposed = matrix.stored.transposed

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        values = self.weight[int(expert)]
        return values.T if self._transposed else values


def block_name(matrix: str, block: int) -> str | None:
    """Name of the decoder block a matrix is in, None outside of them."""
    match = re.match(rf"(.*?\.{block})\.", matrix) if block >= 0 else None
    return None if match is None else match.group(1)
