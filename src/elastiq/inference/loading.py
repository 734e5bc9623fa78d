"""A checkpoint as an ordinary transformers model."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..allocate import Budget, Table, allocate, parse_bytes, read_map
from ..checkpoint import CheckpointReader
from ..checkpoint.files import read_config
from ..checkpoint.manifest import Manifest
from ..checkpoint.names import BASE, CONFIG
from ..core import ElastiqError, LevelMap, Width, library_errors, plain_count, plain_number, require_held, widest
from ..models import read_generation
from ..runtime import (
    MixedMatrix,
    NestedMatrix,
    accelerate,
    bits_per_weight,
    bytes_in_memory,
    changing_widths,
    expected_way,
    keep_a_parameter,
    nested_matrices,
    rearrange,
    swap,
    take_turns,
)
from .attached import attach, hold, reader_of

__all__ = ["bits_per_weight", "bytes_in_memory", "load", "set_bits"]

log = logging.getLogger("elastiq")

Widths = int | float | str | Path | Mapping[str, Width] | LevelMap
"""One width, a mean width (a fraction), the file of a level map, or a width (or one for every row) by matrix name."""

def load(
    path: str | Path,
    bits: Widths | None = None,
    max_bits: int | None = None,
    *,
    memory: str | int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """The model of the checkpoint `path`, read at `bits`; forward() and generate() work as ever.

    bits: one width; a mean width such as 3.37, which `allocate` turns into a level map; a level map or its file; or
    {matrix name: width} with the rest at the widest. None is the widest the directory gives. memory: instead of
    `bits`, what the model may take in all, in bytes or as "1.2GB"; the best map within it is taken.
    max_bits: planes to hold, for `set_bits` without reading again; None holds what is read (as do matrices whose rows
    or experts have widths of their own). dtype: of what is not quantized and of the computation; None is float32 on a
    CPU (whose float16 is slow), else the dtype of config.json.
    verify: compare every file that is read with its checksum first, the tokenizer and generation settings too.
    A directory that `save_pretrained` wrote is loaded with all its planes; None is the width that it was saved at, mean
    widths and `memory` need the checkpoint's level table.

    Raises ElastiqError for a damaged or foreign directory and for a width it cannot give.
    """
    bits, max_bits = plain_widths(bits), plain_count(max_bits, "max_bits")
    if _is_saved(Path(path)):
        return _load_saved(Path(path), bits, max_bits, memory, torch.device(device), dtype)
    reader = CheckpointReader(path, verify=verify)
    reader.check_side_files()
    config = _config(reader.path, reader.config)
    model = _empty(reader, config, dtype or _dtype(config, torch.device(device)))
    matrices = nested_matrices(model)
    if memory is not None:
        widths = _within_memory(reader, model, memory, bits, max_bits)
    else:
        widths = _widths(reader, matrices, bits if bits is not None else reader.available[-1])
    widths = dict[str, Width](dict.fromkeys(matrices, reader.available[-1])) | widths
    if max_bits is not None:
        reader.require(max_bits)
    _rearrange(model, matrices, widths)
    hold(reader, matrices, {name: max(widest(width), max_bits or 0) for name, width in widths.items()})
    for name, matrix_module in matrices.items():
        matrix_module.bits = widths[name]
    _assign_base(model, reader)
    settings = read_generation(reader.path)
    if settings is not None and model.can_generate():
        model.generation_config = settings
    attach(model, reader)
    keep_a_parameter(model)
    nn.Module.to(model, torch.device(device))
    accelerate(model)
    take_turns(model)
    return model


def tokens_way(reader: CheckpointReader) -> str:
    """Which way single tokens of a checkpoint take on a CPU, as far as is known without running it; of its planes only
    those with rotations are read. As `runtime.expected_way`."""
    try:
        model = _empty(reader, _config(reader.path, reader.config), torch.float32)
    except ElastiqError as error:
        return f"unknown: {error}"
    matrices = nested_matrices(model)
    hold(reader, matrices, {name: 1 for name, matrix in matrices.items() if matrix.stored.parts})
    return expected_way(model)


def _empty(reader: CheckpointReader, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with nested modules that hold nothing yet."""
    model = _skeleton(reader, config, dtype)
    untie_stored(model, _stored(reader))
    for matrix in reader.manifest.matrices.values():
        swap(model, matrix)
    return model


def _is_saved(path: Path) -> bool:
    """Whether `save_pretrained` wrote the directory, whose files are cut by size and have no checksums."""
    return (path / CONFIG).is_file() and not (path / BASE).exists() and any(path.glob("model*.safetensors"))


def _load_saved(
    path: Path, bits: Widths | None, max_bits: int | None, memory: str | int | None, device: torch.device,
    dtype: torch.dtype | None,
) -> PreTrainedModel:  # fmt: skip
    data = read_config(path / CONFIG)
    manifest = Manifest.from_config(data, str(path))
    if memory is not None or isinstance(bits, float):
        raise ElastiqError(f"{path}: saved without its level table; give a width or a level map, no mean or memory")
    if max_bits is not None and max_bits > manifest.planes:
        raise ElastiqError(f"{path}: it holds {manifest.planes} planes, not {max_bits}; load the checkpoint itself")
    config = _config(path, data)
    with library_errors(f"{path}: transformers cannot load it", "save it again"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or _dtype(config, device), use_safetensors=True, trust_remote_code=False,
            local_files_only=True,
        )  # fmt: skip
    model.requires_grad_(False)
    if bits is not None:
        set_bits(model, bits)
    nn.Module.to(model, device)
    accelerate(model)
    take_turns(model)
    return model


def set_bits(model: PreTrainedModel, bits: Widths) -> None:
    """Read a loaded model at other widths, given as for `load`; {matrix name: width} may name some of them.

    At once within the planes held; missing planes are read from the checkpoint, which is logged. Nothing changes if
    a name or a width is refused. Calls of the model in other threads are answered at the old widths or at the new ones
    altogether: this waits for those that run, those that come wait for this; what torch.compile made does not wait.
    Raises ElastiqError for what is refused, for a model without nested planes, and within a call of the same thread.
    """
    with changing_widths(model):
        _set_bits(model, bits)


def _set_bits(model: PreTrainedModel, bits: Widths) -> None:
    bits, matrices = plain_widths(bits), nested_matrices(model)
    if not matrices:
        raise ElastiqError("set_bits: this model has no nested planes; load it with elastiq.load")
    reader = reader_of(model)
    if reader is None:
        _set_held(matrices, bits)
        return
    widths = _widths(reader, matrices, bits)
    _rearrange(model, matrices, widths)
    missing = {name: most for name, width in widths.items() if (most := widest(width)) > matrices[name].max_bits}
    if missing:
        first = min(matrices[name].max_bits for name in missing) + 1
        size = hold(reader, matrices, missing)
        log.warning(
            "planes %d to %d of %d matrices read from %s (%.1f MB)",
            first, max(missing.values()), len(missing), reader.path, size / 1e6,
        )  # fmt: skip
    for name, width in widths.items():
        matrices[name].bits = width


def _set_held(matrices: Mapping[str, NestedMatrix], bits: Widths) -> None:
    """Set widths of a model that has no directory behind it (`save_pretrained` wrote it), all or none."""
    if isinstance(bits, float):
        raise ElastiqError("set_bits: a mean width needs the checkpoint's level table; give a level map")
    widths = dict[str, Width](dict.fromkeys(matrices, bits)) if isinstance(bits, int) else _given(bits)
    if name := next((name for name, width in widths.items() if isinstance(width, str)), None):
        raise ElastiqError(f"{name}: widths of rows or experts are read from a checkpoint; use elastiq.load on one")
    before = {name: matrix.bits for name, matrix in matrices.items()}
    try:
        for name, width in widths.items():
            if name not in matrices:
                raise ElastiqError(f"{name}: no quantized matrix of this model has this name")
            matrices[name].bits = width
    except ElastiqError:
        for name, width in before.items():
            matrices[name].bits = width
        raise


def _within_memory(
    reader: CheckpointReader, model: nn.Module, memory: str | int, bits: Widths | None, max_bits: int | None
) -> dict[str, Width]:
    """Widths of the best map that fits, everything counted as this model holds it. Its planes are not read yet."""
    if bits is not None or max_bits is not None:
        raise ElastiqError("memory decides the widths and the planes held; give no bits or max_bits beside it")
    rest = sum({id(array): array.nbytes for array in (*model.parameters(), *model.buffers())}.values())
    found = allocate(reader, Budget(size=parse_bytes(memory)), table=Table.of(reader, base=rest))
    return dict(found.level_map.widths)


def _rearrange(model: nn.Module, matrices: dict[str, NestedMatrix], widths: Mapping[str, Width]) -> None:
    """Other modules for matrices whose rows or experts get widths of their own, or had them."""
    for name, width in widths.items():
        mixed = isinstance(width, str) or isinstance(matrices[name], MixedMatrix)
        if mixed and width != matrices[name].bits:
            matrices[name] = rearrange(model, name, width)


def _widths(reader: CheckpointReader, matrices: Mapping[str, NestedMatrix], bits: Widths) -> dict[str, Width]:
    if isinstance(bits, int) and len(reader.levels) > 1 and reader.levels[0] < bits and bits not in reader.levels:
        log.warning(
            "%d bits have no scales of their own and borrow those of %d, which may be better; %s have their own",
            bits, max(level for level in reader.levels if level < bits), ", ".join(map(str, reader.levels)),
        )  # fmt: skip
    widths = map_widths(reader, bits) if not isinstance(bits, int) else dict[str, Width](dict.fromkeys(matrices, bits))
    for name, width in widths.items():
        reader.require_for(name, width)
    return widths


def map_widths(
    reader: CheckpointReader, bits: float | str | Path | Mapping[str, Width] | LevelMap
) -> dict[str, Width]:
    """{matrix name: width} of anything but a uniform width."""
    bits = plain_widths(bits)
    if isinstance(bits, float):
        return dict(allocate(reader, Budget(bits=bits)).level_map.widths)
    return _given(bits)


def plain_widths(bits: Any) -> Any:
    """Widths as a caller gives them, with numbers of other libraries as Python's own."""
    if isinstance(bits, Mapping):
        return {name: plain_count(width, str(name)) for name, width in bits.items()}
    return plain_number(bits, "bits")


def _given(bits: str | Path | Mapping[str, Width] | LevelMap) -> dict[str, Width]:
    """{matrix name: width} of a level map, its file, or the widths themselves."""
    if isinstance(bits, Mapping):
        return dict(bits)
    return dict(bits.widths if isinstance(bits, LevelMap) else read_map(bits).widths)


def _config(path: Path, found: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a checkpoint as transformers has it, without the quantization."""
    data = {key: value for key, value in found.items() if key != "quantization_config"}
    model_type = data.pop("model_type", None)
    what = f"{path}: transformers {transformers.__version__} cannot read config.json of the architecture {model_type!r}"
    with library_errors(what, "copy config.json again, or use a version of transformers that knows it"):
        config = AutoConfig.for_model(model_type, **data)
    config._name_or_path = str(path)
    return config


def _dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    dtype = config.dtype
    if device.type == "cpu" or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return torch.float32
    return dtype


def _skeleton(reader: CheckpointReader, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    what = f"{reader.path}: transformers {transformers.__version__} makes no causal language model of its config.json"
    with library_errors(what, "copy config.json again"), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.eval().requires_grad_(False)
    model.tie_weights()
    return model


def untie_stored(model: PreTrainedModel, stored: Set[str]) -> None:
    """Parameters that config.json ties but the checkpoint stores apart (both in `stored`) become their own."""
    for name in stored_apart(model, stored):
        parent, _, key = name.rpartition(".")
        own = torch.empty_like(model.get_parameter(name), device="meta")
        model.get_submodule(parent)._parameters[key] = nn.Parameter(own, requires_grad=False)


def has_own_head(reader: CheckpointReader) -> bool:
    """Whether config.json ties parameters that the checkpoint stores apart, such as a head of its own."""
    config = _config(reader.path, reader.config)
    if not getattr(config.get_text_config(), "tie_word_embeddings", True):
        return False
    return bool(stored_apart(_skeleton(reader, config, torch.float32), _stored(reader)))


def _stored(reader: CheckpointReader) -> Set[str]:
    """Names of all parameters in a checkpoint."""
    return reader.base_specs.keys() | {f"{name}.weight" for name in reader.manifest.matrices}


def stored_apart(model: PreTrainedModel, stored: Set[str]) -> list[str]:
    """Names in `stored` of parameters that `model` shares with another one in `stored`."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [name for aliases in names.values() for name in [alias for alias in aliases if alias in stored][1:]]


def _assign_base(model: PreTrainedModel, reader: CheckpointReader) -> None:
    """Give every parameter and persistent buffer that is not nested its stored value, tied ones under all names."""
    targets = _targets(model)
    wanted = {name for aliases in targets.values() for name in aliases}
    strange = sorted(reader.base_specs.keys() - wanted)
    if strange:
        raise ElastiqError(
            f"{reader.path}: the model of config.json has no {strange[0]}; the files do not belong together"
        )
    aliases_of = {name: aliases for aliases in targets.values() for name in aliases}
    for name, tensor in reader.base():
        _assign(model, aliases_of[name], tensor, reader)
        wanted -= set(aliases_of[name])
    if wanted:
        raise ElastiqError(
            f"{reader.path}: base.safetensors lacks {sorted(wanted)[0]}; copy it from the original checkpoint"
        )


def _targets(model: PreTrainedModel) -> dict[int, list[str]]:
    """Names of everything base.safetensors holds, one list per parameter or buffer."""
    targets = defaultdict(list)
    nested = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, NestedMatrix))
    for name, tensor in model.state_dict(keep_vars=True).items():
        inside_nested = name.startswith(nested) and not name.endswith(".bias")
        if not inside_nested:
            targets[id(tensor)].append(name)
    return targets


def _assign(model: PreTrainedModel, names: list[str], tensor: Tensor, reader: CheckpointReader) -> None:
    """Put one stored tensor in the place of a parameter or buffer, the same object under all its names."""
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    old = cast(Tensor, getattr(*owners[0]))
    if old.shape != tensor.shape:
        raise ElastiqError(
            f"{reader.path}: {names[0]} is {list(tensor.shape)} in base.safetensors, config.json says "
            f"{list(old.shape)}; the files do not belong together"
        )
    require_held(tensor, old.dtype, f"{reader.path}: {names[0]}")
    value = tensor.to(old.dtype)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    for module, key in owners:
        setattr(module, key, value)
