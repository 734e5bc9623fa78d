"""What llama.cpp wants to know of each family, and how it orders and shifts their weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ...core import ElastiqError, library_errors

log = logging.getLogger("elastiq")

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Models of one architecture of llama.cpp.

    describe: writes the metadata. rotated: rows of the query and key matrices are interleaved for its rotation.
    shifted_norms: norms are stored as 1 + weight.
    """

    architecture: str
    describe: Callable[[Any, Config], None]
    rotated: bool = False
    shifted_norms: bool = False

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
        return {"rope_freqs.weight": _llama3_factors(rope, config)} if rope.get("rope_type") == "llama3" else {}


def family_of(config: Config) -> Family:
    """Raises ElastiqError for a family that is not known here, or a setting of it that llama.cpp would not see."""
    model_type = config.get("model_type")
    if model_type not in _FAMILIES:
        raise ElastiqError(
            f"gguf: the architecture {model_type!r} cannot be written; known: {', '.join(sorted(_FAMILIES))}"
        )
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear") and not (kind == "llama3" and model_type in ("llama", "mistral")):
        raise ElastiqError(f"gguf: the rotation {kind!r} of {model_type} cannot be written; export to hf")
    return _FAMILIES[model_type]


def _rope(config: Config) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else {}
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
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _llama(writer: Any, config: Config) -> None:
    _decoder(writer, config)
    window = config.get("sliding_window")
    if window and window < config["max_position_embeddings"]:
        log.warning("gguf: attention to the last %d tokens only cannot be written; longer texts will differ", window)
    writer.add_rope_dimension_count(_head_dim(config))


def _gemma(writer: Any, config: Config) -> None:
    _decoder(writer, _complete(config))


def _gemma2(writer: Any, config: Config) -> None:
    config = _complete(config)
    _check_query_scale(config, 46)
    _decoder(writer, config)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("sliding_window", writer.add_sliding_window),
    ):
        if config.get(key) is not None:
            add(config[key])


def _gemma3(writer: Any, config: Config) -> None:
    config = _complete(config)
    _check_query_scale(config, 62)
    if config.get("attn_logit_softcapping") is not None or config.get("use_bidirectional_attention"):
        raise ElastiqError("gguf: a Gemma 3 with capped or bidirectional attention cannot be written; export to hf")
    _decoder(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_rope_freq_base_swa(float(config["rope_parameters"]["sliding_attention"]["rope_theta"]))
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _complete(config: Config) -> Config:
    """config.json with what transformers takes where it is silent."""
    with library_errors("gguf: transformers cannot read config.json", "copy it again from the original checkpoint"):
        full: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    return full


def _check_query_scale(config: Config, largest: int) -> None:
    """llama.cpp scales queries by the size of a head, and in the family's `largest` model by its share of the width."""
    by_width = config["num_hidden_layers"] == largest
    expected = config["hidden_size"] // config["num_attention_heads"] if by_width else _head_dim(config)
    if config["query_pre_attn_scalar"] != expected:
        raise ElastiqError(
            f"gguf: queries are scaled for {config['query_pre_attn_scalar']} channels, and llama.cpp would scale them "
            f"for {expected}; export to hf"
        )


def _gpt2(writer: Any, config: Config) -> None:
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ElastiqError("gguf: a GPT-2 whose inner size is not four times its width cannot be written; export to hf")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


_FAMILIES = {
    "llama": Family("llama", _llama, rotated=True),
    "mistral": Family("llama", _llama, rotated=True),
    "qwen2": Family("qwen2", _decoder),
    "qwen3": Family("qwen3", _decoder),
    "gemma": Family("gemma", _gemma, shifted_norms=True),
    "gemma2": Family("gemma2", _gemma2, shifted_norms=True),
    "gemma3_text": Family("gemma3", _gemma3, shifted_norms=True),
    "gpt2": Family("gpt2", _gpt2),
}


def _llama3_factors(rope: Config, config: Config) -> Tensor:
    """What each rotation frequency is divided by: 1 for fast ones, `factor` for slow ones, blended between."""
    base, width = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0), _head_dim(config)
    length = 2 * math.pi * base ** (torch.arange(0, width, 2).double() / width)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], float(rope["factor"])
    old = rope["original_max_position_embeddings"]
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
