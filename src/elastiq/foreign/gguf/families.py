"""What llama.cpp wants to know of each family, and how it orders and shifts their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ...core import ElastiqError, library_errors

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Models of one architecture of llama.cpp.

    describe: writes the metadata. check: raises ElastiqError for what it cannot say. carried: keys of config.json that
    the metadata or the arrays say, beside `_SIZES`. rotated: rows of the query and key matrices are interleaved for
    its rotation. shifted_norms: norms are stored as 1 + weight. period: of a window on attention, one layer in so many
    sees everything; None where all do.
    """

    architecture: str
    describe: Callable[[Any, Config], None]
    carried: frozenset[str] = frozenset()
    check: Callable[[Config], None] = lambda config: None
    rotated: bool = False
    shifted_norms: bool = False
    period: int | None = None

    def adapt(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """A parameter [out, ...] (or anything else with its rows) as llama.cpp wants it."""
        if self.shifted_norms and name.endswith("norm.weight"):
            return tensor + 1
        heads = self._rotated_heads(name, config)
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape) if heads else tensor

    def restore(self, name: str, tensor: Tensor, config: Config) -> Tensor:
        """The inverse of `adapt`."""
        if self.shifted_norms and name.endswith("norm.weight"):
            return tensor - 1
        heads = self._rotated_heads(name, config)
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape) if heads else tensor

    def _rotated_heads(self, name: str, config: Config) -> int:
        owner = name.rpartition(".")[0]
        if not self.rotated or not owner.endswith(("q_proj", "k_proj")):
            return 0
        heads = config["num_attention_heads"]
        return int(heads if owner.endswith("q_proj") else config.get("num_key_value_heads") or heads)

    def extra_tensors(self, config: Config) -> dict[str, Tensor]:
        """Tensors that a checkpoint does not have: the factors of Llama 3's rotation."""
        rope = _rope(config)
        return {"rope_freqs.weight": llama3_factors(rope, _head_dim(config))} if rope["rope_type"] == "llama3" else {}


def family_of(config: Config) -> Family:
    """Raises ElastiqError for a family that is not known here, or a setting of it that llama.cpp would not see.

    config: complete, as `complete` makes it. Every setting of it has to be carried, to be of no meaning for what is
    computed, or to be what the family always has, so that a new one is refused until somebody has looked at it.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ElastiqError(
            f"gguf: the architecture {model_type!r} cannot be written; known: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    carried = family.carried | _SIZES
    usual = complete({"model_type": model_type, **{key: config[key] for key in carried if key in config}})
    for key in sorted(usual.keys() - carried - _OF_NO_MEANING):  # a key that the class does not have is never read
        if config.get(key) != usual[key] and not (config.get(key) in _ONE_FUNCTION and usual[key] in _ONE_FUNCTION):
            raise _refusal(model_type, key, config.get(key), f"takes {usual[key]!r} for granted")
    if "sliding_window" in usual:
        _check_window(family, config)
    _check_rotation(model_type, config)
    family.check(config)
    return family


def complete(config: Config) -> Config:
    """config.json with what transformers takes where it is silent. Raises ElastiqError where it takes none of it."""
    with library_errors("gguf: transformers cannot read config.json", "export to hf"):
        full: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    return full


def _refusal(model_type: object, key: str, value: object, instead: str) -> ElastiqError:
    return ElastiqError(
        f"gguf: {key} of this {model_type} is {value!r}, which a GGUF file cannot say (llama.cpp {instead}); export to "
        "hf"
    )


def _check_window(family: Family, config: Config) -> None:
    """Raises ElastiqError where layers attend to a window that llama.cpp would not give them."""
    model_type, window = config["model_type"], config.get("sliding_window")
    count = config.get("num_hidden_layers") or config["n_layer"]
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * count
    if family.period is not None:
        usual = ["full_attention" if (i + 1) % family.period == 0 else "sliding_attention" for i in range(count)]
        if kinds != usual:
            raise _refusal(model_type, "layer_types", kinds, f"lets one layer in {family.period} see everything")
        return
    if window and window < config["max_position_embeddings"] and "sliding_attention" in kinds:
        raise _refusal(model_type, "sliding_window", window, "lets every layer see everything")


def _check_rotation(model_type: str, config: Config) -> None:
    """Raises ElastiqError for a scaling of positions that llama.cpp would not do."""
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for rope in _rotations(config):
        kind = rope["rope_type"]
        if kind == "linear":
            used = known | {"factor"}
        elif kind == "llama3" and model_type in ("llama", "mistral"):
            used = known | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        elif kind == "default":
            used = known | {"factor", "original_max_position_embeddings"}  # nothing reads them
        else:
            raise ElastiqError(f"gguf: the rotation {kind!r} of {model_type} cannot be written; export to hf")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refusal(model_type, "partial_rotary_factor", rope["partial_rotary_factor"], "turns whole heads")
        for key in sorted(rope.keys() - used):
            if rope[key] is not None:
                raise _refusal(model_type, f"{key} of the rotation", rope[key], "has no such number")


def _rotations(config: Config) -> list[dict[str, Any]]:
    rope = config.get("rope_parameters") or {}
    return [_named(part) for part in rope.values()] if "full_attention" in rope else [_named(rope)] if rope else []


def _rope(config: Config) -> dict[str, Any]:
    rope: Config = config.get("rope_parameters") or {}
    return _named(rope.get("full_attention", rope))


def _named(rope: Config) -> dict[str, Any]:
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _decoder(writer: Any, config: Config) -> None:
    """What all families with rotary positions and RMS norms share."""
    rope = _rope(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _llama(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_rope_dimension_count(_head_dim(config))


def _check_gemma2(config: Config) -> None:
    _check_query_scale(config)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[key] is None:
            raise _refusal("gemma2", key, None, "always caps")


def _gemma2(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _check_gemma3(config: Config) -> None:
    _check_query_scale(config)
    local = _named(config["rope_parameters"]["sliding_attention"])
    if local["rope_type"] != "default":
        raise _refusal("gemma3_text", "the rotation of layers with a window", local["rope_type"], "never scales it")


def _gemma3(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    if config["final_logit_softcapping"] is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def query_channels(config: Config) -> int:
    """Channels for whose number llama.cpp scales the queries of a Gemma: of a head, save in the largest models."""
    if config["num_hidden_layers"] == _LARGEST[config["model_type"]]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return _head_dim(config)


def _check_query_scale(config: Config) -> None:
    expected = query_channels(config)
    if config["query_pre_attn_scalar"] != expected:
        raise ElastiqError(
            f"gguf: queries are scaled for {config['query_pre_attn_scalar']} channels, and llama.cpp would scale them "
            f"for {expected}; export to hf"
        )


def _check_gpt2(config: Config) -> None:
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ElastiqError("gguf: a GPT-2 whose inner size is not four times its width cannot be written; export to hf")


def _gpt2(writer: Any, config: Config) -> None:
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


_SIZES = frozenset({
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "n_embd", "n_layer", "n_head", "n_inner",
    "n_positions", "layer_norm_epsilon", "sliding_window", "layer_types",
})  # fmt: skip
"""Keys that `describe` writes, or a check of its own holds against what llama.cpp does."""
_OF_NO_MEANING = frozenset({
    # what a file, a program or a class is called
    "model_type", "architectures", "transformers_version", "_name_or_path", "dtype",
    # what is asked of a model, not what it computes
    "output_hidden_states", "output_attentions", "return_dict", "use_cache", "chunk_size_feed_forward",
    "reorder_and_upcast_attn",
    # training, and heads of another kind
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "pretraining_tp", "id2label",
    "label2id", "problem_type", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout",
    # said by the tokenizer, by the arrays, or by layer_types
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "use_sliding_window", "max_window_layers",
    "_sliding_window_pattern",
})  # fmt: skip
_ONE_FUNCTION = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the family's model of 27 billion parameters."""
_SCALED = frozenset({"final_logit_softcapping", "query_pre_attn_scalar"})
_CAPPED = _SCALED | {"attn_logit_softcapping"}
FAMILIES = {
    "llama": Family("llama", _llama, frozenset({"attention_bias", "mlp_bias"}), rotated=True),
    "mistral": Family("llama", _llama, rotated=True),
    "qwen2": Family("qwen2", _decoder),
    "qwen3": Family("qwen3", _decoder),
    "gemma": Family("gemma", _decoder, shifted_norms=True),
    "gemma2": Family("gemma2", _gemma2, _CAPPED, _check_gemma2, shifted_norms=True, period=2),
    "gemma3_text": Family("gemma3", _gemma3, _SCALED, _check_gemma3, shifted_norms=True, period=6),
    "gpt2": Family("gpt2", _gpt2, check=_check_gpt2),
}
"""By model_type of transformers."""


def llama3_factors(rope: Config, width: int) -> Tensor:
    """What each frequency of a rotation of `width` channels is divided by [width / 2].

    1 for fast ones, `factor` for slow ones, blended between.
    """
    length = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, width, 2).double() / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], float(rope["factor"])
    old = rope["original_max_position_embeddings"]
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
