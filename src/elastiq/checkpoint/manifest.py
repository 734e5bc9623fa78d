"""What config.json says about the quantization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core import FUSED, MAX_BITS, ROLES, ArraySpec, ElastiqError, storage
from ..runtime.stored import StoredMatrix, readable_widths
from .names import BASE, FORMAT_VERSION, QUANT_METHOD, is_array_name, plane_file
from .parts import from_rows, to_rows

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Manifest:
    """The `quantization_config` of a checkpoint.

    levels: widths quantized with scales of their own, ascending. planes: how many plane files belong to the directory.
    matrices: by name of the array.
    """

    levels: tuple[int, ...]
    planes: int
    symmetric: bool
    embeddings: bool
    group_size: int
    matrices: dict[str, StoredMatrix]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.readable(self.planes)

    def readable(self, planes: int) -> tuple[int, ...]:
        """Widths that every matrix has when the first `planes` planes are there."""
        return readable_widths(self.levels, planes, all(matrix.coded for matrix in self.matrices.values()))

    def plane_arrays(self, plane: int) -> dict[str, ArraySpec]:
        """Every array of one plane file by its full name."""
        return {
            f"{matrix.name}.{short}": spec
            for matrix in self.matrices.values()
            for short, spec in matrix.arrays(plane).items()
        }

    def weight_map(self, base: Iterable[str]) -> dict[str, str]:
        """File of every array, `base` being the names of what is not quantized."""
        planes = {name: plane_file(p) for p in range(1, self.planes + 1) for name in self.plane_arrays(p)}
        return dict.fromkeys(base, BASE) | planes

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "levels": list(self.levels),
            "planes": self.planes,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "embeddings": self.embeddings,
            "modules": {
                m.name: {"role": m.role, "shape": list(m.shape), "group_size": m.group_size}
                | ({} if m.coded else {"coded": False})
                | ({} if m.scales == "half" else {"scales": m.scales})
                | ({"parts": to_rows(m.parts)} if m.parts else {})
                for m in self.matrices.values()
            },
        }

    @staticmethod
    def from_config(config: object, where: str) -> Manifest:
        """The manifest in a parsed config.json. Raises ElastiqError where it cannot be read."""
        data = config.get("quantization_config") if isinstance(config, dict) else None
        if not isinstance(data, dict) or data.get("quant_method") != QUANT_METHOD:
            raise ElastiqError(f"{where}: not an elastiq checkpoint; make one with elastiq quantize")
        version = data.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise ElastiqError(
                f"{where}: format version {version} is newer than {FORMAT_VERSION}, all this elastiq reads; upgrade it"
            )
        if version != FORMAT_VERSION:
            raise _bad(where, "format_version", version)
        levels, planes = data.get("levels"), data.get("planes")
        if not isinstance(levels, list) or not _ascending(levels):
            raise _bad(where, "levels", levels)
        if not isinstance(planes, int) or not _whole(planes, levels[-1]) or (len(levels) == 1 and planes != levels[0]):
            raise _bad(where, "planes", planes)
        for flag in ("symmetric", "embeddings"):
            if not isinstance(data.get(flag), bool):
                raise _bad(where, flag, data.get(flag))
        if data.get("group_size") != -1 and not _whole(data.get("group_size")):
            raise _bad(where, "group_size", data.get("group_size"))
        modules = data.get("modules")
        if not isinstance(modules, dict) or not modules:
            raise _bad(where, "modules", modules)
        matrices = {name: _matrix(name, row, tuple(levels), data["symmetric"], where) for name, row in modules.items()}
        return Manifest(tuple(levels), planes, data["symmetric"], data["embeddings"], data["group_size"], matrices)


def _matrix(name: str, row: object, levels: tuple[int, ...], symmetric: bool, where: str) -> StoredMatrix:
    if not is_array_name(name) or not isinstance(row, dict) or row.get("role") not in ROLES:
        raise _bad(where, f"modules.{name}", row)
    shape, group_size = row.get("shape"), row.get("group_size")
    axes = 3 if row["role"] in FUSED else 2
    if not isinstance(shape, list) or len(shape) != axes or not all(_whole(size) for size in shape):
        raise _bad(where, f"modules.{name}.shape", shape)
    if not isinstance(group_size, int) or not _whole(group_size):
        raise _bad(where, f"modules.{name}.group_size", group_size)
    coded = row.get("coded", True)
    try:
        parts = from_rows(row.get("parts", []))
    except ElastiqError as error:
        raise ElastiqError(f"{where}: {name}: {error}") from None
    for part in parts:  # what is allocated by these facts is bounded by the matrix
        said = part.facts.get("shape", shape[-2:]), part.facts.get("in_features", shape[-1])
        if said != (shape[-2:], shape[-1]):
            raise _bad(where, f"modules.{name}.parts", part.facts)
    if type(coded) is not bool or not (coded or parts):
        raise _bad(where, f"modules.{name}.coded", coded)
    scales = row.get("scales", "half")
    try:
        known = isinstance(scales, str) and bool(storage(scales).row(1))
    except ElastiqError:
        known = False
    if not known:
        raise _bad(where, f"modules.{name}.scales", scales)
    return StoredMatrix(name, row["role"], tuple(shape), group_size, levels, symmetric, coded, parts, scales)


def _whole(value: object, most: int = MAX_SIZE) -> bool:
    return type(value) is int and 1 <= value <= most


def _ascending(levels: list[Any]) -> bool:
    return bool(levels) and all(_whole(level, MAX_BITS) for level in levels) and levels == sorted(set(levels))


def _bad(where: str, what: str, value: object) -> ElastiqError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ElastiqError(
        f"{where}: {what} of the quantization_config in config.json is {shown}, which cannot be; copy config.json again"
    )
