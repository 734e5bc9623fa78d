"""Directories of GPTQ, AWQ, compressed-tensors and bitsandbytes as ordinary 16-bit model directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.files import json_bytes, range_chunks, read_json, write_durably
from ..checkpoint.names import CONFIG, INDEX, travels_along
from ..checkpoint.publish import write_aside
from ..checkpoint.tensors import read_header, tensor_bytes, write_tensors
from ..core import ElastiqError, held, library_errors
from ..models.source import SINGLE, tensor_files
from . import bitsandbytes
from .awq import awq_dense
from .compressed import compressed_dense
from .gptq import gptq_dense
from .packed_settings import AWQ, BITSANDBYTES, COMPRESSED, GPTQ, Known, check_settings
from .read_back import read_back

Layer = dict[str, Tensor]
"""Arrays of one packed layer by short name."""


def import_packed(directory: str | Path, output: str | Path) -> None:
    """Write the packed model in `directory` to the new directory `output`, its weights unpacked to float16, those of a
    matrix that it does not hold to float32.

    Raises ElastiqError for a format that is not read, and for arrays that do not fit together.
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(method, str) or method not in METHODS:
        raise ElastiqError(f"{directory}: quant_method {method!r} is not read; known: {', '.join(METHODS)}")
    key, reader, known = METHODS[method]
    check_settings(directory, settings, known)
    dense = reader(settings)
    write_aside(Path(output), False, lambda work: _write(directory, work, config, key, dense))


def _write(
    directory: Path, work: Path, config: dict[str, Any], key: str, dense: Callable[[str, Layer], Tensor]
) -> None:
    files = _files(directory)
    layers = sorted(name.removesuffix(f".{key}") for name in files if name.endswith(f".{key}"))
    if not layers:
        raise ElastiqError(f"{directory}: no array ends in {key}; there is nothing packed in it")
    owned = {f"{layer}.{short}": layer for layer in layers for short in _SHORTS}
    transposed = _TRANSPOSED.get(str(config.get("model_type")), ())
    handles = {file: safe_open(file, framework="pt") for file in sorted(set(files.values()))}

    def array(name: str) -> Tensor:
        tensor: Tensor = handles[files[name]].get_tensor(name)
        return tensor

    def unpacked(layer: str) -> Tensor:
        arrays = {short: array(f"{layer}.{short}") for short in _SHORTS if f"{layer}.{short}" in files}
        with library_errors(f"{directory}: the arrays of {layer} do not fit together", "copy the model again"):
            values = dense(layer, arrays)
        if not bool(torch.isfinite(values).all()):
            raise ElastiqError(f"{directory}: {layer} holds scales that are no numbers; copy it again")
        values = values.T if layer.rpartition(".")[2] in transposed else values
        half = held(values, torch.float16)
        return half if half.dtype == torch.float16 else values

    plain = [name for name in files if name not in owned]
    specs = {name: (array(name).dtype, tuple(array(name).shape)) for name in plain}
    for layer in layers:
        values = unpacked(layer)
        specs[f"{layer}.weight"] = (values.dtype, tuple(values.shape))

    def payload(name: str) -> Iterator[Any]:
        layer = name.removesuffix(".weight")
        yield tensor_bytes(unpacked(layer) if name not in plain else array(name))

    write_tensors(work / "model.safetensors", specs, payload)
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    write_durably(work / CONFIG, [json_bytes(kept, CONFIG)])
    read_back(
        directory, work, "meta", lambda name: name.endswith(".bias") and name in files and not bool(array(name).any())
    )
    for path in sorted(directory.iterdir()):
        if travels_along(path.name) and path.is_file():
            write_durably(work / path.name, range_chunks(path, 0, path.stat().st_size))


def _files(directory: Path) -> dict[str, Path]:
    """The file of every array: those that the index names, or all there are."""
    shards = sorted(directory.glob("*.safetensors"))
    if not shards or any((directory / usual).is_file() for usual in (SINGLE, INDEX)):
        files = {name: directory / file for name, file in tensor_files(directory).items()}
        shards = sorted(set(files.values()))
    else:
        files = {name: file for file in shards for name in read_header(file)[0]}
    for file in shards:
        read_header(file)  # which is stricter than the package's own reader
    return files


def _gptq(settings: Mapping[str, Any]) -> Callable[[str, Layer], Tensor]:
    less = 0 if "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format")) else 1

    def dense(layer: str, arrays: Layer) -> Tensor:
        return gptq_dense(arrays, _width(len(arrays["qweight"]), arrays["g_idx"].numel(), layer), less)

    return dense


def _awq(settings: Mapping[str, Any]) -> Callable[[str, Layer], Tensor]:
    if settings.get("bits") != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
        raise ElastiqError("awq: only four bits in the GEMM layout are read")
    return lambda layer, arrays: awq_dense(arrays)


def _compressed(settings: Mapping[str, Any]) -> Callable[[str, Layer], Tensor]:
    if settings.get("format") != "pack-quantized":
        raise ElastiqError(f"compressed-tensors: format {settings.get('format')!r} is not read, only pack-quantized")

    def dense(layer: str, arrays: Layer) -> Tensor:
        rows, columns = (int(size) for size in arrays["weight_shape"])
        held, words = arrays["weight_packed"].shape
        if rows != held:
            raise ValueError(f"weight_shape says {rows} rows, weight_packed holds {held}")
        return compressed_dense(arrays, _width(words, columns, layer))

    return dense


def _width(words: int, codes: int, layer: str) -> int:
    """Bits of a code where so many lie in a stream of 32-bit words: what the arrays say, whatever config.json does."""
    bits = words * 32 // codes
    if not 1 <= bits <= 8 or -(-codes * bits // 32) != words:
        raise ElastiqError(f"{layer}: {codes} codes in {words} words are of no width from 1 to 8 bits; copy it again")
    return bits


_TRANSPOSED = {"gpt2": ("c_attn", "c_fc", "c_proj"), "openai-gpt": ("c_attn", "c_fc", "c_proj")}
"""Layers whose weight the model keeps as [in, out], by family."""
_SHORTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *bitsandbytes.SHORTS,
)
METHODS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Callable[[str, Layer], Tensor]], Known]] = {
    "gptq": ("qweight", _gptq, GPTQ),
    "awq": ("qweight", _awq, AWQ),
    "compressed-tensors": ("weight_packed", _compressed, COMPRESSED),
    "bitsandbytes": (bitsandbytes.KEY, bitsandbytes.bitsandbytes_reader, BITSANDBYTES),
}
"""By quant_method: the array by which a packed layer is known, how layers are unpacked, the settings it may have."""
