"""One GGUF file, for llama.cpp and everything built on it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checkpoint.files import read_json
from ...core import ElastiqError
from ..target import Exported, ExportedMatrix, Target, dense_model, relative_error, require_rows_held
from ..view import GridCodes, View
from .blocks import BLOCK_TYPES, BlockType, encode
from .families import Config, Family, complete, family_of

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment]

BY_WIDTH = {1: "Q2_K", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
"""Type of a matrix that is read at a width, where none is asked for."""
_FULL = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class GGUF(Target, name="gguf"):
    """A GGUF file with tokenizer and metadata.

    Types with minima (Q2_K, Q4_K, Q5_K, Q4_1, Q5_1) hold the codes of the level asked for on refitted scales. The
    others have no zero points, so that no code of ours survives: they are fitted to the values of the widest level, and
    to those of the level itself where they have more bits than it. A width between two levels has no scales of its own
    and is fitted to the widest level too.

    type: one of `BLOCK_TYPES` for every quantized matrix, None to choose by its width. exact: refuse to store a matrix
    in a way that changes what it says.
    """

    is_file = True

    type: str | None = None
    exact: bool = False

    def check(self, view: View) -> None:
        if gguf is None:
            raise ElastiqError("gguf: the package gguf is not installed; run pip install 'elastiq[gguf]'")
        if self.type is not None and self.type not in BLOCK_TYPES:
            raise ElastiqError(f"gguf: unknown type {self.type}; known: {', '.join(BLOCK_TYPES)}")
        family_of(complete(view.config))
        for name, stored in view.matrices.items():
            if stored.in_features % 32:
                raise ElastiqError(
                    f"gguf: {name} has {stored.in_features} input channels and blocks hold 32; keep it in 16 bits "
                    "or export to hf"
                )

    def write(self, view: View, path: Path) -> Exported:
        config = complete(view.config)
        family = family_of(config)
        names = _names(view, family, config)
        done = Exported()
        writer = gguf.GGUFWriter(path, family.architecture)
        writer.add_name(str(view.config.get("_name_or_path") or view.reader.info.get("model") or view.reader.path.name))
        family.describe(writer, config)
        _add_tokenizer(writer, view)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kinds = {name: self._kind(view, name) for name in view.matrices}
        main = max(kinds.values(), key=lambda kind: sum(k is kind for k in kinds.values()))
        writer.add_file_type(_FILE_TYPES[main.name])
        arrays = sorted([*view.matrices, *view.reader.base_specs], key=lambda name: _order(names[name]))
        extra = dict(family.extra_tensors(config))
        announced = {names[name]: _announced(view, name, kinds) for name in arrays}
        announced |= {name: ("F32", list(values.shape)) for name, values in extra.items()}
        for name, (kind, shape) in announced.items():
            done.arrays[name] = f"{kind} {shape}"
            _announce(writer, name, kind, shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        base = dict(view.base())
        for name in arrays:
            if name in base:
                writer.write_tensor_data(_plain(family.adapt(name, base[name].float(), config), base[name].dtype))
            else:
                data, row = self._matrix(view, name, kinds[name], family, config)
                writer.write_tensor_data(data)
                done.matrices.append(row)
        for values in extra.values():
            writer.write_tensor_data(values.float().numpy())
        writer.close()
        return done

    def open(self, path: Path, view: View) -> PreTrainedModel:
        config = complete(view.config)
        family = family_of(config)
        ours = {theirs: name for name, theirs in _names(view, family, config).items()}
        state = []
        for tensor in gguf.GGUFReader(path).tensors:
            if tensor.name in ours:
                values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
                name, stored = ours[tensor.name], view.matrices.get(ours[tensor.name])
                full = name if stored is None else f"{name}.weight"
                values = family.restore(full, values, config)
                state.append((full, values.mT if stored is not None and stored.transposed else values))
        return dense_model(view, state)

    def found(self, path: Path) -> dict[str, str]:
        return {
            tensor.name: f"{tensor.tensor_type.name} {[int(size) for size in reversed(tensor.shape)]}"
            for tensor in gguf.GGUFReader(path).tensors
        }

    def _kind(self, view: View, name: str) -> BlockType:
        kind = BLOCK_TYPES[self.type or BY_WIDTH[view.widths[name]]]
        while view.matrices[name].in_features % kind.block:
            assert kind.fallback is not None  # `check` saw to blocks of 32
            kind = BLOCK_TYPES[kind.fallback]
        return kind

    def _matrix(
        self, view: View, name: str, kind: BlockType, family: Family, config: Config
    ) -> tuple[np.ndarray, ExportedMatrix]:
        own = view.codes(name)
        levels = view.matrices[name].levels
        between = own.bits > levels[0] and own.bits not in levels
        fits = (kind.affine or kind.bits > own.bits) and not between
        codes = own if fits else view.codes(name, view.reader.available[-1])
        scale, offset = _runs(codes, kind)
        values = family.adapt(f"{name}.weight", codes.dense(), config)
        if scale is not None and offset is not None:
            scale = family.adapt(f"{name}.weight", scale, config)
            offset = family.adapt(f"{name}.weight", offset, config)
        data = encode(kind, values, scale, offset).numpy()
        held = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind.name]))
        error = relative_error(values, held)
        require_rows_held(self.name, view.matrices[name], own.bits, error)
        row = ExportedMatrix(name, own.bits, kind.name, 8 * data.nbytes, values.numel(), codes.bits, error)
        if self.exact and row.error:
            raise ElastiqError(
                f"gguf: {name} at {own.bits} bits is not held exactly by {kind.name} (it adds an error of "
                f"{row.error:.2g}); leave --exact out, or choose another --type"
            )
        return data, row


def _runs(codes: GridCodes, kind: BlockType) -> tuple[Tensor | None, Tensor | None]:
    """Scale and offset of every run of a block type, where its runs lie within our groups and its codes hold ours."""
    if codes.group_size % kind.run or codes.bits > kind.bits:
        return None, None
    scale, zero_point = codes.per_column()
    return scale[:, :: kind.run], (-scale * zero_point)[:, :: kind.run]


def _names(view: View, family: Family, config: Config) -> dict[str, str]:
    """llama.cpp's name of everything in the checkpoint."""
    count = config.get("num_hidden_layers") or config["n_layer"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture.upper()], count)
    names: dict[str, str] = {}
    for name in (*view.reader.base_specs, *view.matrices):
        full = f"{name}.weight" if name in view.matrices else name
        theirs = table.get_name(full, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ElastiqError(f"gguf: llama.cpp has no name for {full} of {family.architecture}; export to hf")
        names[name] = theirs
    return names


def _order(name: str) -> tuple[int, str]:
    """Blocks in their order, after everything outside of them."""
    block = name.split(".")[1] if name.startswith("blk.") else "-1"
    return int(block), name


def _announced(view: View, name: str, kinds: Mapping[str, BlockType]) -> tuple[str, list[int]]:
    """Type and shape of an array in the file. Vectors are float32, because llama.cpp adds and multiplies by them so."""
    if name in kinds:
        return kinds[name].name, list(view.matrices[name].shape)
    dtype, shape = view.reader.base_specs[name]
    return ("F32" if len(shape) < 2 else _FULL[dtype]), list(shape)


def _announce(writer: Any, name: str, kind: str, shape: list[int]) -> None:
    number = gguf.GGMLQuantizationType[kind]
    per_block, num_bytes = gguf.GGML_QUANT_SIZES[number]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // per_block * num_bytes, number)


def _plain(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    if values.dim() < 2:
        return values.numpy()
    stored = values.to(dtype)
    return (stored.view(torch.int16) if dtype == torch.bfloat16 else stored).numpy()


def _add_tokenizer(writer: Any, view: View) -> None:
    """Vocabulary, merges, special tokens and chat template. Raises ElastiqError for a kind that llama.cpp lacks."""
    directory = view.reader.path
    data = read_json(directory / "tokenizer.json")
    model = data.get("model", {}) if isinstance(data, dict) else {}
    if model.get("type") != "BPE":
        raise ElastiqError(f"gguf: the tokenizer is {model.get('type')!r}, only BPE can be written; export to hf")
    size = complete(view.config)["vocab_size"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    named = [(token, index, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()]
    for added in data.get("added_tokens", ()):
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        named.append((added["content"], added["id"], special))
    for token, index, kind in named:
        if index < size:  # a token beyond has no embedding
            tokens[index], kinds[index] = token, kind
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, model, tokens, kinds)
        writer.add_add_space_prefix(_prepends_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(data.get("pre_tokenizer")))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special_vocab = gguf.SpecialVocab(directory, load_merges=not model.get("byte_fallback"), n_vocab=size)
    special_vocab.add_special_token.setdefault("bos", False)
    special_vocab.add_to_gguf(writer, quiet=True)


def _add_sentencepiece(writer: Any, model: Mapping[str, Any], tokens: list[str], kinds: list[Any]) -> None:
    """A BPE over characters with single bytes behind it: llama.cpp merges by the score of the result."""
    scores = [-1e6] * len(tokens)
    for rank, pair in enumerate(model["merges"]):
        merged = model["vocab"].get("".join(pair if isinstance(pair, list) else pair.split(" ", 1)))
        if merged is not None and scores[merged] == -1e6:
            scores[merged] = -float(rank)
    for index, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            kinds[index] = gguf.TokenType.BYTE
        elif token == model.get("unk_token"):
            kinds[index] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)


def _prepends_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text begins with the mark of a space of its own: Llama's does, Gemma's does not."""
    normalizer = tokenizer.get("normalizer") or {}
    parts = [normalizer, *normalizer.get("normalizers", ()), tokenizer.get("pre_tokenizer") or {}]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _splitting(pre_tokenizer: object) -> str:
    """llama.cpp's name of the rule that cuts text before merging."""
    key = json.dumps(_essence(pre_tokenizer))
    if key not in _SPLITTINGS:
        raise ElastiqError("gguf: the tokenizer cuts text by a rule that has no name here; export to hf")
    return _SPLITTINGS[key]


def _essence(rule: Any) -> Any:
    """A pre-tokenizer without what does not matter for encoding."""
    kind = rule.get("type") if isinstance(rule, dict) else None
    if kind == "Sequence":
        return [_essence(part) for part in rule["pretokenizers"]]
    if kind == "ByteLevel":
        return ["ByteLevel", rule.get("use_regex", True)]
    if kind == "Digits":
        return ["Digits", rule.get("individual_digits")]
    if kind == "Split":
        return ["Split", rule["pattern"].get("Regex")]
    return kind


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTINGS = {
    json.dumps(rule): name
    for rule, name in (
        (["ByteLevel", True], "gpt-2"),
        ([["Digits", True], ["ByteLevel", True]], "smollm"),
        ([["Split", _WORDS % "{1,3}"], ["ByteLevel", False]], "llama-bpe"),
        ([["Split", _WORDS % ""], ["ByteLevel", False]], "qwen2"),
    )
}
_FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
               "Q6_K": 18}  # fmt: skip
