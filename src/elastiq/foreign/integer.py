"""What the integer formats of other tools share: a scale and a whole zero point per group, or none."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..core import ArraySpec, ElastiqError
from ..runtime.stored import StoredMatrix
from .target import (
    Exported,
    ExportedMatrix,
    Target,
    dense_model,
    directory_arrays,
    held_dtype,
    relative_error,
    require_rows_held,
    write_directory,
)
from .view import GridCodes, View

_SCALES = torch.linspace(0.75, 1.2, 46).tolist()


@dataclass(frozen=True)
class Packed:
    """A matrix as value = scale * (code - zero): codes uint8 [out, in], scale float32 and zero [out, groups] whole."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    def dense(self) -> Tensor:
        return GridCodes(self.codes, self.scale, self.zero.float(), self.group_size, self.bits).dense()


def refit(source: GridCodes, bits: int, symmetric: bool, lowest_zero: int = 0) -> Packed:
    """The nearest matrix whose zero points are whole: in [lowest_zero, 2^bits - 1], or all 2^(bits-1) if symmetric.

    Scales are searched around the range of each group and refitted by least squares.
    """
    values, size, top = source.dense(), source.group_size, 2**bits - 1
    x = values.unflatten(-1, (-1, size))
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if symmetric:
        half = 2 ** (bits - 1)
        zeros = [torch.full_like(low, half)]
        start = torch.maximum(-low / half, high / max(half - 1, 1))
    else:
        start = source.scale if source.bits == bits else (high - low) / top
        wanted = source.zero_point if source.bits == bits else -low / start.clamp(min=1e-30)
        zeros = [z.clamp(lowest_zero, top) for z in (wanted.floor(), wanted.ceil())]
    smallest = 2.0**-24
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = start, zeros[0]
    for zero in zeros:
        for factor in _SCALES:
            scale = (start * factor).clamp(smallest, 65504.0)
            codes = ((x / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top) - zero.unsqueeze(-1)
            energy = codes.square().sum(-1)
            scale = torch.where(energy > 0, (codes * x).sum(-1) / energy, scale)
            scale = scale.clamp(smallest, 65504.0).half().float()
            codes = ((x / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, top) - zero.unsqueeze(-1)
            error = (codes * scale.unsqueeze(-1) - x).square().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    codes = ((x / best_scale.unsqueeze(-1)).round() + best_zero.unsqueeze(-1)).clamp(0, top).flatten(-2)
    return Packed(codes.to(torch.uint8), best_scale, best_zero.to(torch.uint8), bits, size)


class IntegerTarget(Target):
    """Base of directories in which some linear layers are packed and everything else stays in 16 bits.

    widths: widths that readers of the format take. lowest_zero: smallest zero point it can say.
    """

    widths: tuple[int, ...]
    lowest_zero = 0
    exact: bool

    def symmetric(self, bits: int) -> bool:
        """Whether matrices of this width have no zero points of their own."""
        return False

    @abstractmethod
    def arrays(self, stored: StoredMatrix, bits: int) -> dict[str, ArraySpec]:
        """Arrays of one matrix [out, in] by short name."""

    def known(self, stored: StoredMatrix) -> dict[str, Tensor]:
        """Arrays that say nothing of the values."""
        return {}

    @abstractmethod
    def pack(self, packed: Packed) -> dict[str, Tensor]:
        """Their content."""

    @abstractmethod
    def unpack(self, arrays: dict[str, Tensor], stored: StoredMatrix, bits: int) -> Tensor:
        """Values float32 [out, in] that the arrays say."""

    @abstractmethod
    def settings(self, view: View, packed: dict[str, int]) -> dict[str, Any]:
        """The quantization_config; packed: width of every packed matrix."""

    def check(self, view: View) -> None:
        for name, stored in view.matrices.items():
            if stored.fused or stored.transposed:
                raise ElastiqError(f"{self.name}: {name} is no ordinary linear layer; export to hf or gguf")
            if stored.role != "linear":
                continue
            if view.widths[name] not in self.widths:
                known = ", ".join(map(str, self.widths))
                raise ElastiqError(f"{self.name}: {name} is read at {view.widths[name]} bits, the format has {known}")
            if stored.in_features % 32 or stored.out_features % 32 or stored.in_features % stored.group_size:
                raise ElastiqError(
                    f"{self.name}: {name} of {list(stored.shape)} is not a multiple of 32 and of its groups of "
                    f"{stored.group_size}; export to gguf or hf"
                )

    def write(self, view: View, path: Path) -> Exported:
        packed = {name: view.widths[name] for name, stored in view.matrices.items() if stored.role == "linear"}
        if not packed:
            raise ElastiqError(f"{self.name}: there is no linear layer to pack; export to hf")
        specs: dict[str, ArraySpec] = dict(view.reader.base_specs)
        owner: dict[str, str] = {}
        for name, stored in view.matrices.items():
            if name not in packed:
                specs[f"{name}.weight"] = (held_dtype(view, stored, torch.float16), stored.shape)
                continue
            arrays = self.arrays(stored, packed[name])
            specs |= {f"{name}.{short}": spec for short, spec in arrays.items()}
            owner |= {f"{name}.{short}": name for short in arrays}
        base, rows = dict(view.base()), {}
        made: dict[str, Tensor] = {}  # arrays of matrices that are packed already, until they are written

        def payload(full: str) -> Iterator[Tensor]:
            if full in base:
                yield base[full]
            elif full in owner:
                name = owner[full]
                known = self.known(view.matrices[name]).get(full.removeprefix(f"{name}."))
                if known is None and full not in made:
                    arrays, rows[name] = self.pack_matrix(view, name)
                    made.update({f"{name}.{short}": array for short, array in arrays.items()})
                yield made.pop(full) if known is None else known
            else:
                yield view.dense(full.removesuffix(".weight")).to(specs[full][0])

        settings = self.settings(view, packed)
        done = write_directory(view, path, specs, payload, {**view.config, "quantization_config": settings})
        done.matrices.extend(rows.values())
        return done

    def found(self, path: Path) -> dict[str, str]:
        return directory_arrays(path)

    def open(self, path: Path, view: View) -> PreTrainedModel:
        with safe_open(path / "model.safetensors", framework="pt") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = []
        for name, stored in view.matrices.items():
            if stored.role == "linear":
                bits = view.widths[name]
                shorts = self.arrays(stored, bits)
                own = {short: arrays.pop(f"{name}.{short}") for short in shorts}
                state.append((f"{name}.weight", self.unpack(own, stored, bits)))
        return dense_model(view, [*state, *arrays.items()])

    def pack_matrix(self, view: View, name: str) -> tuple[dict[str, Tensor], ExportedMatrix]:
        """The arrays of one matrix."""
        bits = view.widths[name]
        symmetric = self.symmetric(bits)
        source = view.codes(name, view.source_bits(name) if symmetric else bits)
        packed = refit(source, bits, symmetric, self.lowest_zero)
        error = relative_error(source.dense(), packed.dense())
        require_rows_held(self.name, view.matrices[name], bits, error)
        if self.exact and error:
            raise ElastiqError(
                f"{self.name}: {name} at {bits} bits has zero points that are not whole (rounding them adds an error "
                f"of {error:.2g}); leave --exact out"
            )
        arrays = self.pack(packed)
        count = 8 * sum(array.nbytes for array in arrays.values())
        return arrays, ExportedMatrix(name, bits, self.name, count, packed.codes.numel(), source.bits, error)


def main_width(packed: dict[str, int]) -> int:
    """The width of most matrices."""
    return Counter(packed.values()).most_common(1)[0][0]


def unpacked_modules(view: View, packed: dict[str, int]) -> list[str]:
    """Modules that may look like linear layers and are not packed."""
    base = [name.removesuffix(".weight") for name, (_, shape) in view.reader.base_specs.items() if len(shape) == 2]
    others = [name for name in view.matrices if name not in packed]
    return sorted({*base, *others, "lm_head"})
