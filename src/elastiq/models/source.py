"""A model directory on disk: configuration, tokenizer and tensors. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..core import ElastiqError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelSource:
    """A directory that holds a Hugging Face model in safetensors, or the snapshot of one on the hub.

    model: directory or hub name. revision: branch, tag or commit of the hub repository.
    path: the directory. config: its configuration. tensor_files: tensor name -> file name of the shard that holds it.

    Raises ElastiqError where the directory, its configuration or its shards cannot be used, saying what is wrong.
    """

    def __init__(self, model: str | Path, revision: str | None = None) -> None:
        self.path = _directory(model, revision)
        self.config = _read_config(self.path)
        self.tensor_files = tensor_files(self.path)

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
        index = (INDEX,) if (self.path / INDEX).is_file() else ()
        names = ("config.json", *index, *self.shards, *self.tokenizer_files())
        return {name: _sha256(self.path / name) for name in sorted(names)}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; raises ElastiqError if the directory has none."""
        if not self.tokenizer_files():
            raise ElastiqError(f"{self.path} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise ElastiqError(f"{self.path}: the tokenizer cannot be loaded: {_first_line(error)}") from error

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
        """The tensor as stored (a view of the map; copy it to keep it). Raises ElastiqError if it cannot be read."""
        file = self._source.tensor_files[name]
        if file not in self._files:
            self._files[file] = _open_shard(self._source.path / file)
        try:
            return self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise ElastiqError(
                f"{self._source.path / file} does not hold the tensor {name} that the index promises; "
                "download the model again"
            ) from error

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
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise ElastiqError(
            f"{model} is not a directory here and could not be fetched from the hub ({_first_line(error)}); "
            "check the name and the connection"
        ) from error


def _read_config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    if not file.is_file():
        raise ElastiqError(f"{path} is not a model directory: it has no config.json")
    data = _read_json(file)
    model_type = data.get("model_type")
    if (settings := data.get("quantization_config")) is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise ElastiqError(f"{path} is already quantized (quant_method {method}); give the 16-bit model")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ElastiqError(
            f"{path}: the architecture {model_type!r} is not part of transformers {transformers.__version__}, "
            "and code from a model directory is never run"
        ) from error


def tensor_files(path: Path) -> dict[str, str]:
    """Array name -> file of a model directory, by its index where it has one.

    Raises ElastiqError where files are missing, lie elsewhere, or are pickles only.
    """
    index = path / INDEX
    if index.is_file():
        files = _read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ElastiqError(f"{index} has no weight_map of file names; download the model again")
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise ElastiqError(f"{index} names a shard outside its directory: {name}")
            if not (path / name).is_file():
                raise ElastiqError(f"{path} lacks the shard {name} that {INDEX} names; download the model again")
        return files
    if not (path / SINGLE).is_file():
        if any(file for pattern in _PICKLES for file in path.glob(pattern)):
            raise ElastiqError(
                f"{path} holds its weights as pickle files only, which are never read; "
                "save it once in safetensors with save_pretrained"
            )
        raise ElastiqError(f"{path} holds no weights: neither {SINGLE} nor {INDEX}")
    with _open_shard(path / SINGLE) as handle:
        return dict.fromkeys(handle.keys(), SINGLE)


def _open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ElastiqError(f"{file} is truncated or damaged ({_first_line(error)}); download it again") from error
    except OSError as error:
        raise ElastiqError(f"{file} cannot be read ({_first_line(error)})") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ElastiqError(f"{file} is too large for what its name says; download it again")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ElastiqError(f"{file} cannot be read ({_first_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise ElastiqError(f"{file} is not valid JSON ({_first_line(error)})") from error
    if not isinstance(data, dict):
        raise ElastiqError(f"{file} is not a JSON object")
    return data


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ElastiqError(f"{file} cannot be read ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)
