"""Read a checkpoint directory that nobody vouches for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..core import ArraySpec, ElastiqError, Recipe, Width, width_counts
from .files import read_checksums, read_config, read_json, sha256
from .manifest import Manifest
from .names import BASE, CONFIG, INDEX, LEVELS, RECIPE, is_plain, is_read_along, plane_file
from .tensors import read_header


class CheckpointReader:
    """An elastiq checkpoint, whole, sliced or copied by hand without its last planes.

    Headers and sizes of all files present are checked at once, against config.json; with `verify`, every file is
    checked against its checksum before it is first used. Arrays are memory-mapped.

    Raises ElastiqError with one sentence for every fault.

    path: the directory. config: config.json, parsed. manifest: its quantization_config. planes: plane files present.
    available: widths this directory can give. levels: those among them with scales of their own.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        self.verify = verify
        if not self.path.is_dir():
            raise ElastiqError(f"{self.path}: no such directory; give the output of elastiq quantize")
        self._verified: set[str] = set()
        if not (self.path / CONFIG).is_file():
            raise ElastiqError(
                f"{self.path}: not an elastiq checkpoint (it has no config.json); give the output of quantize"
            )
        self.config = read_config(self.path / CONFIG)
        self.manifest = Manifest.from_config(self.config, str(self.path))
        self.check(CONFIG)
        self.planes = self._count_planes()
        self.available = self.manifest.readable(self.planes)
        self.levels = tuple(level for level in self.manifest.levels if level in self.available)
        self.base_specs = self._read_base_header()
        for plane in range(1, self.planes + 1):
            self._check_plane_header(plane)
        self._check_index()

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 by file name, from checksums.json."""
        return {name: row["sha256"] for name, row in read_checksums(self.path).items()}

    @cached_property
    def recipe(self) -> Recipe:
        """What the checkpoint was made with."""
        self.check(RECIPE)
        data = read_json(self.path / RECIPE)
        if not isinstance(data, dict):
            raise ElastiqError(f"{self.path / RECIPE}: not a recipe; copy it from the original checkpoint")
        return Recipe.from_dict(data)

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """Rows of levels.json, one per matrix (experts of one tensor each have their own)."""
        rows = self.level_table["matrices"]
        for row in rows:
            name = row.get("name") if isinstance(row, dict) else None
            if not isinstance(name, str) or row.get("tensor") not in self.manifest.matrices or not _level_rows(row):
                raise ElastiqError(
                    f"{self.path / LEVELS}: its row {name!r} is broken; copy it from the original checkpoint"
                )
        return list(rows)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the run that levels.json keeps."""
        info = self.level_table.get("info")
        return info if isinstance(info, dict) else {}

    @cached_property
    def level_table(self) -> dict[str, Any]:
        """levels.json, parsed: rows of matrices, totals, info."""
        self.check(LEVELS)
        data = read_json(self.path / LEVELS)
        if not isinstance(data, dict) or not isinstance(data.get("matrices"), list):
            raise ElastiqError(f"{self.path / LEVELS}: not a level table; copy it from the original checkpoint")
        return data

    def require(self, bits: int) -> None:
        """Raise ElastiqError, naming the widths there are, unless the directory gives `bits`."""
        if bits in self.available:
            return
        missing = range(self.planes + 1, self.manifest.planes + 1)
        remedy = "ask for one of these"
        if bits in self.manifest.widths:
            remedy = f"copy {', '.join(map(plane_file, missing))} beside the others for more"
        raise ElastiqError(f"{self.path}: it can be read at {_listed(self.available)} bits, not {bits}; {remedy}")

    def require_for(self, name: str, width: Width) -> None:
        """`require` for every width in which a matrix is read. Raises ElastiqError too for an unknown matrix, and where
        widths of rows or experts are not as many as these."""
        if name not in self.manifest.matrices:
            raise self.unknown(name)
        matrix = self.manifest.matrices[name]
        if isinstance(width, str) and (matrix.members == 1 or len(width) != matrix.members):
            members = "experts" if matrix.fused else "rows"
            raise ElastiqError(
                f"{name}: {len(width)} widths were given for {matrix.role} {list(matrix.shape)}; give one for the whole"
                + ("" if matrix.members == 1 else f", or one digit for each of its {matrix.members} {members}")
            )
        for bits in width_counts(width, 1):
            self.require(bits)

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything that is not quantized."""
        yield from self._arrays(BASE, self.base_specs)

    def plane(self, plane: int, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """(matrix name, its arrays by short name) of one plane, for `NestedMatrix.hold`."""
        self.require_plane(plane)
        wanted = {
            f"{name}.{short}": (name, short) for name in names for short in self.manifest.matrices[name].arrays(plane)
        }
        grouped: dict[str, dict[str, Tensor]] = {}
        for full, tensor in self._arrays(plane_file(plane), wanted):
            name, short = wanted[full]
            grouped.setdefault(name, {})[short] = tensor
        yield from grouped.items()

    def read(self, tensor: str, bits: int) -> dict[str, Tensor]:
        """Arrays of one matrix that `bits` needs, by short name. Raises ElastiqError for an unknown name or width."""
        if tensor not in self.manifest.matrices:
            raise self.unknown(tensor)
        self.require(bits)
        arrays: dict[str, Tensor] = {}
        for plane in range(1, bits + 1):
            for _, found in self.plane(plane, [tensor]):
                arrays |= found
        return arrays

    def unknown(self, name: str) -> ElastiqError:
        """The error for a matrix name the checkpoint does not have."""
        fused = name.rpartition(".")[0]
        if fused in self.manifest.matrices:
            return ElastiqError(f"{name}: experts of one tensor share a width; set {fused}")
        example = next(iter(self.manifest.matrices))
        return ElastiqError(f"{name}: no quantized matrix of {self.path} has this name; names are like {example}")

    def require_plane(self, plane: int) -> None:
        """Raise ElastiqError if the file of a plane is gone."""
        if not (self.path / plane_file(plane)).is_file():
            raise ElastiqError(f"{self.path}: {plane_file(plane)} is missing; copy it beside the others")

    def check(self, name: str) -> None:
        """Compare a file with its checksum, once. Raises ElastiqError if it was altered or has none."""
        if not self.verify or name in self._verified:
            return
        if name not in self.digests:
            raise ElastiqError(
                f"{self.path}: checksums.json does not cover {name}; copy checksums.json from the original"
            )
        if sha256(self.path / name) != self.digests[name]:
            raise ElastiqError(f"{self.path / name}: altered (its checksum is not the recorded one); copy it again")
        self._verified.add(name)

    def check_side_files(self) -> None:
        """`check` for the tokenizer, templates and generation settings that are there, which others read."""
        for file in sorted(self.path.iterdir()):
            if is_read_along(file.name) and file.is_file():
                self.check(file.name)

    def _arrays(self, file: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        self.check(file)
        with safe_open(self.path / file, framework="pt") as arrays:
            for name in names:
                yield name, arrays.get_tensor(name)

    def _count_planes(self) -> int:
        files = range(1, self.manifest.planes + 1)
        present = [plane for plane in files if (self.path / plane_file(plane)).is_file()]
        first_missing = min(set(files) - set(present), default=self.manifest.planes + 1)
        prefix = first_missing - 1
        if not self.manifest.readable(prefix) or len(present) > prefix:
            reason = "no width can be read without it"
            if prefix and len(self.manifest.levels) == 1:
                reason = f"the one width of this checkpoint, {self.manifest.levels[0]} bits, needs it"
            elif prefix:
                reason = f"planes {_listed(tuple(p for p in present if p > prefix))} are of no use without it"
            raise ElastiqError(
                f"{self.path}: {plane_file(first_missing)} is missing, {reason}; copy it from the original"
            )
        return prefix

    def _read_base_header(self) -> dict[str, ArraySpec]:
        entries, _ = read_header(self.path / BASE)
        return {name: entry.spec for name, entry in entries.items()}

    def _check_plane_header(self, plane: int) -> None:
        path = self.path / plane_file(plane)
        found = {name: entry.spec for name, entry in read_header(path)[0].items()}
        expected = self.manifest.plane_arrays(plane)
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise ElastiqError(
                    f"{path}: {name} is {_shown(found.get(name))}, config.json says {_shown(expected.get(name))}; "
                    "copy both files from one checkpoint"
                )

    def _check_index(self) -> None:
        path = self.path / INDEX
        if not path.is_file():
            return
        data = read_json(path)
        weight_map = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(weight_map, dict) or not all(is_plain(file) for file in weight_map.values()):
            raise ElastiqError(
                f"{path}: it names something else than files of this directory; get the checkpoint again"
            )
        if weight_map != self.manifest.weight_map(self.base_specs):
            raise ElastiqError(
                f"{path}: it does not fit config.json and base.safetensors; copy it from the same checkpoint"
            )


def _level_rows(row: dict[str, Any]) -> bool:
    levels = row.get("levels")
    return isinstance(levels, dict) and all(
        isinstance(cell, dict)
        and type(cell.get("num_bits")) is int
        and (cell.get("error") is None or isinstance(cell["error"], (int, float)))
        for cell in levels.values()
    )


def _listed(values: tuple[int, ...]) -> str:
    if len(values) > 2 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return " or ".join(map(str, values))


def _shown(spec: ArraySpec | None) -> str:
    return "absent" if spec is None else f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"
