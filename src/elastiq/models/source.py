"""A model directory on disk: configuration, tokenizer and tensors. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..core import ElastiqError, first_line, library_errors
from .scaled import Scaling, is_eight_bit

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_JSON = 256 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth")
_SETTINGS = ("quantization_config", "compression_config")
"""Keys under which config.json says how weights are stored, the second as compressed-tensors once wrote it."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelSource:
    """A directory that holds a Hugging Face model in safetensors, or the snapshot of one on the hub.

    model: directory or hub name. revision: branch, tag or commit of the hub repository.
    path: the directory. config: its configuration, without what it says about 8-bit weights, which are read as the
    weights they stand for. tensor_files: tensor name -> file name of the shard that holds it. scaling: what the 8-bit
    ones mean. is_eight_bit: whether the directory says that it holds such weights.

    Raises ElastiqError where the directory, its configuration or its shards cannot be used, saying what is wrong.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.path = _directory(model, revision)
        self.config, settings = _read_config(self.path)
        self.tensor_files = tensor_files(self.path)
        self.scaling = Scaling(self.path, self.tensor_files, settings)
        self.is_eight_bit = bool(settings or self.scaling.companions)

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the shards, sorted."""
        return tuple(sorted(set(self.tensor_files.values())))

    @property
    def num_bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.path / name).stat().st_size for name in self.shards)

    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files that exist in the directory."""
        return tuple(name for name in TOKENIZER_FILES if (self.path / name).is_file())

    def fingerprint(self) -> dict[str, str]:
        """File name -> SHA-256 of its whole content, for configuration, shards and tokenizer files."""
        index = () if (self.path / SINGLE).is_file() else (INDEX,)
        names = ("config.json", *index, *self.shards, *self.tokenizer_files())
        return {name: _sha256(self.path / name) for name in sorted(names)}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; raises ElastiqError if the directory has none."""
        if not self.tokenizer_files():
            raise ElastiqError(f"{self.path} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
        return load_tokenizer(self.path)

    @contextmanager
    def open(self) -> Iterator[TensorReader]:
        """Memory-mapped access to the tensors; the maps are released when the context ends and no tensor is held."""
        reader = TensorReader(self)
        try:
            yield reader
        finally:
            reader.close()


class TensorReader:
    """Reads tensors by their checkpoint names, each shard mapped on first use."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._files: dict[str, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor as stored (a view of the map; copy it to keep it), or float32 where it is 8 bits with scales.

        Raises ElastiqError, naming the tensor, if it cannot be read or is stored in a way that is not known.
        """
        return self._source.scaling.weights(name, self._stored(name), self._stored)

    def _stored(self, name: str) -> Tensor:
        file = self._source.tensor_files[name]
        if file not in self._files:
            self._files[file] = _open_shard(self._source.path / file)
        with library_errors(f"{self._source.path / file}: the tensor {name} cannot be read", "download it again"):
            return cast(Tensor, self._files[file].get_tensor(name))

    def close(self) -> None:
        for handle in self._files.values():
            handle.__exit__(None, None, None)
        self._files.clear()


def _directory(model: str | Path, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ElastiqError(
            f"{path} is a file, not a model directory; give the directory that holds config.json, or use elastiq import"
        )
    if isinstance(model, Path) or not _HUB_NAME.fullmatch(model) or model.startswith("."):
        raise ElastiqError(f"{model} does not exist; give a model directory or a hub name such as org/name")
    patterns = ["*.safetensors", "config.json", "generation_config.json", INDEX, *TOKENIZER_FILES]
    missing = f"{model} is not a directory here and could not be fetched from the hub"
    with library_errors(missing, "check the name and the connection"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory, which runs no code of it. Raises ElastiqError if it has none that can be loaded."""
    with library_errors(f"{path}: the tokenizer cannot be loaded", "copy its files again from the original model"):
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True),
        )


def _read_config(path: Path) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The configuration, and apart from it the quantization_config of 8-bit weights ({} where there is none)."""
    file = path / "config.json"
    if not file.is_file():
        raise ElastiqError(f"{path} is not a model directory: it has no config.json")
    data = _read_json(file)
    settings = _settings(path, data)
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ElastiqError(
            f"{path}: the architecture {model_type!r} is not part of transformers {transformers.__version__}, "
            "and code from a model directory is never run"
        )
    if (path / ADAPTER).is_file():
        raise ElastiqError(f"{path} holds an adapter beside the model ({ADAPTER}); merge it first, or remove it")
    with library_errors(f"{file} is not read by transformers {transformers.__version__}", "mend that value"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        parts = (config, config.get_text_config())
        dtypes = [part.dtype for part in parts]
    for dtype in dtypes:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ElastiqError(f"{file} says dtype {dtype}, which no weights have; write float16, bfloat16 or float32")
    for part in parts:
        for key in _SETTINGS:
            part.__dict__.pop(key, None)
    return config, settings


def _settings(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about how its weights are stored. Raises ElastiqError for all but 8-bit ones."""
    text = data.get("text_config")
    places = (data, text if isinstance(text, dict) else {})
    settings = next((place[key] for place in places for key in _SETTINGS if place.get(key) is not None), None)
    if settings is None:
        return {}
    if isinstance(settings, dict) and is_eight_bit(settings):
        return settings
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
    raise ElastiqError(f"{path} is already quantized (quant_method {method}); give the 16-bit model")


def tensor_files(path: Path) -> dict[str, str]:
    """Array name -> file of a model directory, as transformers finds them.

    One file by its usual name comes before an index. Of an index the files count: what they hold is there, whatever it
    says of it, and the last one has it where several do. Raises ElastiqError where files are missing, lie elsewhere, or
    are pickles only, and for a promised array that no file holds.
    """
    if (path / SINGLE).is_file():
        return dict.fromkeys(_names(path / SINGLE), SINGLE)
    index = path / INDEX
    if not index.is_file():
        if any(file for pattern in _PICKLES for file in path.glob(pattern)):
            raise ElastiqError(
                f"{path} holds its weights as pickle files only, which are never read; "
                "save it once in safetensors with save_pretrained"
            )
        raise ElastiqError(f"{path} holds no weights: neither {SINGLE} nor {INDEX}")
    promised = _read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not promised or not all(isinstance(name, str) for name in promised.values()):
        raise ElastiqError(f"{index} has no weight_map of file names; download the model again")
    files: dict[str, str] = {}
    for shard in sorted(set(promised.values())):
        if Path(shard).name != shard:
            raise ElastiqError(f"{index} names a shard outside its directory: {shard}")
        if not (path / shard).is_file():
            raise ElastiqError(f"{path} lacks the shard {shard} that {INDEX} names; download the model again")
        files |= dict.fromkeys(_names(path / shard), shard)
    if lost := sorted(promised.keys() - files.keys()):
        raise ElastiqError(f"{index} promises the tensor {lost[0]}, which no file holds; download the model again")
    return files


def _names(file: Path) -> list[str]:
    with _open_shard(file) as handle:
        return list(handle.keys())


def _open_shard(file: Path) -> Any:
    with library_errors(f"{file} is damaged or cannot be read", "download it again, or mend its permissions"):
        return safe_open(file, framework="pt", device="cpu")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ElastiqError(f"{file} is too large for what its name says; download it again")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ElastiqError(f"{file} cannot be read ({first_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise ElastiqError(f"{file} is not valid JSON ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise ElastiqError(f"{file} is not a JSON object")
    return data


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ElastiqError(f"{file} cannot be read ({first_line(error)})") from error
