"""What the metadata of a GGUF file says of a model, as transformers' configurations have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from ...core import ElastiqError
from ..read_back import REMEDY, shown
from .families import llama3_factors, query_channels

Said = dict[str, Any]
"""Metadata of a file by key, without the architecture in front."""

ROTATION_ARRAYS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Arrays that are no weights: what frequencies of the rotation are divided by."""


def configured(file: Path, read: PretrainedConfig, said: Said, arrays: frozenset[str], rotation: Mapping[str, Tensor]
               ) -> PretrainedConfig:  # fmt: skip
    """`read`, what transformers made of the metadata `said`, with everything that it leaves out.

    arrays: names of all arrays of the file. rotation: those of `ROTATION_ARRAYS` that it has.
    Raises ElastiqError naming every key that no attribute of the configuration takes.
    """
    data, declared = read.to_dict(), type(read)().to_dict()
    said = _with_defaults(file, said, declared)
    unread = [key for key, value in said.items() if not _put(data, declared, key, value)]
    rotates = "rope_parameters" in declared
    used, rope = _rotation(file, read, said, rotation) if rotates else (set(), {})
    unread = sorted(key for key in unread if key not in used)
    if not rotates and rotation:
        unread.append(min(rotation))
    if unread:
        raise ElastiqError(
            f"{file}: nothing of a {read.model_type} in transformers takes {shown(unread)}; {REMEDY}"
        )
    data |= {"rope_parameters": rope} if rotates else {}
    for flag, parts in _BIASES.items():
        if flag in declared:
            data[flag] = any(f".{part}.bias" in name for name in arrays for part in parts)
    if "layer_types" in declared:
        data["layer_types"] = _layer_types(said, len(data.get("layer_types") or ()) or int(said["block_count"]))
    if "query_pre_attn_scalar" in declared:
        data["query_pre_attn_scalar"] = query_channels(data)
    if "original_max_position_embeddings" in declared:
        data["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", said["context_length"])
    config = type(read).from_dict(data)
    check_configuration(file, config, said)
    return config


def check_configuration(file: Path, config: PretrainedConfig, said: Said) -> None:
    """Raises ElastiqError for a key of the metadata of which `config` says something else."""
    declared = type(config)().to_dict()
    for key, value in said.items():
        name = _attribute(declared, key)
        held = getattr(config, name) if name else value
        same_number = isinstance(held, float) and np.float32(held) == np.float32(value)
        if not same_number and (held or None) != (value or None):
            raise ElastiqError(
                f"{file}: {key} is {value!r}, and transformers' {config.model_type} makes {held!r} of it; "
                + REMEDY
            )


def plain_value(value: Any) -> Any:
    """A number of a file as people write it (the shortest that is the same in single precision); one for equal ones."""
    if isinstance(value, tuple):
        return plain_value(value[0]) if value and len(set(value)) == 1 else list(map(plain_value, value))
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _with_defaults(file: Path, said: Said, declared: Mapping[str, Any]) -> Said:
    """What llama.cpp takes where the metadata is silent. Raises ElastiqError for what it never takes for granted."""
    said = {key: value if key == _PATTERN else plain_value(value) for key, value in said.items()}
    needed = ["context_length", "attention.head_count"]
    if not any(key in said for key in _EPSILONS):
        needed.append(_EPSILONS[0])
    if said.get("attention.sliding_window") is None and "layer_types" in declared and declared.get("sliding_window"):
        needed.append("attention.sliding_window")
    for key in needed:
        if key not in said:
            raise ElastiqError(f"{file}: {key} is missing from its metadata; convert the model again")
    heads = said["attention.head_count"]
    said.setdefault("attention.head_count_kv", heads)
    if isinstance(heads, int):
        said.setdefault("attention.key_length", said["embedding_length"] // heads)
        said.setdefault("attention.value_length", said["attention.key_length"])
    said["attention.sliding_window"] = said.get("attention.sliding_window") or None
    return said


def _attribute(declared: Mapping[str, Any], key: str) -> str | None:
    return next((name for name in _ATTRIBUTES.get(key, ()) if name in declared), None)


def _put(data: dict[str, Any], declared: Mapping[str, Any], key: str, value: Any) -> bool:
    """Set the attribute that a key means; whether there is one, or the value changes nothing."""
    name = _attribute(declared, key)
    if name is not None:
        data[name] = value
        return True
    implied = {
        "attention.key_length": lambda: _head_dim(data),
        "attention.value_length": lambda: _head_dim(data),
        "attention.head_count_kv": lambda: data.get("num_attention_heads", data.get("n_head")),
        "feed_forward_length": lambda: 4 * data.get("hidden_size", data.get("n_embd", 0)),
    }
    if key in implied:
        return bool(value == implied[key]())
    if key == _PATTERN:
        return "layer_types" in declared
    return key in _OF_NO_MEANING or (key in _NEUTRAL and value in _NEUTRAL[key])


def _head_dim(data: Mapping[str, Any]) -> int:
    heads = data.get("num_attention_heads", data.get("n_head"))
    return int(data.get("head_dim") or data.get("hidden_size", data.get("n_embd")) // heads)


def _layer_types(said: Said, count: int) -> list[str] | None:
    """Which layers attend to a window, where the file says it; None is what the family does."""
    pattern = said.get(_PATTERN)
    if pattern is None:
        return None
    if isinstance(pattern, int):
        pattern = [(index + 1) % pattern != 0 if pattern else True for index in range(count)]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]


def _rotation(
    file: Path, read: PretrainedConfig, said: Said, arrays: Mapping[str, Tensor]
) -> tuple[set[str], dict[str, Any]]:
    """(keys of the metadata that were used, rope_parameters). Raises ElastiqError for what is not known."""
    before = read.rope_parameters or {}
    nested = "full_attention" in before
    width = _head_dim({**read.to_dict(), "head_dim": said["attention.key_length"]})
    rope = {"rope_theta": float(said.get("rope.freq_base", 10000.0)), **_scaling(file, said, arrays, width)}
    used = {"rope.freq_base", "rope.dimension_count", *_SCALING}
    turned = said.get("rope.dimension_count", width)
    if "partial_rotary_factor" in (before["full_attention"] if nested else before):
        rope["partial_rotary_factor"] = turned / width
    elif turned != width:
        used.remove("rope.dimension_count")
    if not nested:
        return used, rope
    short = {"rope_type": "default", "rope_theta": float(said.get("rope.freq_base_swa", 10000.0))}
    return used | {"rope.freq_base_swa"}, {"full_attention": rope, "sliding_attention": short}


def _scaling(file: Path, said: Said, arrays: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """The kind of a rotation and its numbers."""
    kind = str(said.get("rope.scaling.type", "linear"))
    divided = said.get("rope.scaling.factor") or said.get("rope.scale_linear") or 1.0
    factor = 1.0 if kind == "none" else float(divided)
    louder = float(said.get("rope.scaling.attn_factor", 1.0))
    original = int(said.get("rope.scaling.original_context_length") or said["context_length"])
    fitting = factor == 1.0 and kind != "yarn" if arrays else kind in ("none", "linear", "yarn")
    if not fitting or (louder != 1.0 and kind != "yarn" and len(arrays) < 2):
        raise ElastiqError(
            f"{file}: a rotation scaled by {kind!r} with {', '.join(sorted(arrays)) or 'no arrays'}, a factor of "
            f"{factor:g} and one of {louder:g} on attention is not read; {REMEDY}"
        )
    if arrays:
        return _divided(file, said, arrays, width, original, louder)
    if kind == "yarn":
        betas = [name for name in ("beta_fast", "beta_slow") if f"rope.scaling.yarn_{name}" in said]
        loudness = louder * (0.1 * float(np.log(factor)) + 1.0)
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **({"attention_factor": loudness} if louder != 1.0 else {}),
            **{name: float(said[f"rope.scaling.yarn_{name}"]) for name in betas},
        }
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}


def _divided(
    file: Path, said: Said, arrays: Mapping[str, Tensor], width: int, original: int, louder: float
) -> dict[str, Any]:
    """A rotation whose frequencies are divided by numbers that the file holds."""
    short = arrays.get("rope_freqs.weight", arrays.get("rope_factors_short.weight"))
    long = arrays.get("rope_freqs.weight", arrays.get("rope_factors_long.weight"))
    turned: int = said.get("rope.dimension_count", width)
    if short is None or long is None or len(arrays) == 3 or short.shape != long.shape or short.numel() != turned // 2:
        raise ElastiqError(f"{file}: {', '.join(sorted(arrays))} do not fit {turned} rotated channels; copy it again")
    if "rope_freqs.weight" in arrays:
        base = float(said.get("rope.freq_base", 10000.0))
        for length in (original, *(1 << power for power in range(10, 18))):  # not in the file, but numbers tell
            rope: dict[str, Any] = {
                "rope_type": "llama3", "factor": float(short.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": length,
            }  # fmt: skip
            wanted = llama3_factors({**rope, "rope_theta": base}, turned)
            if bool(((wanted - short).abs() <= 1e-5 * short.abs()).all()) and rope["factor"] > 1:
                return rope
    return {
        "rope_type": "longrope",
        "short_factor": [plain_value(float(factor)) for factor in short],
        "long_factor": [plain_value(float(factor)) for factor in long],
        "original_max_position_embeddings": original,
        "attention_factor": louder,
    }


_PATTERN = "attention.sliding_window_pattern"
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    _EPSILONS[0]: ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    _EPSILONS[1]: ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
    "shortconv.l_cache": ("conv_L_cache",),
}
"""Attributes of transformers' configurations that a key of llama.cpp means; the first that a configuration has."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.sliding_window": (None, 0),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_gating_func": (1,),
    "logit_scale": (1.0,),
}
"""Values that say what a model without the attribute does anyway."""
_OF_NO_MEANING = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
_SCALING = frozenset({
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor",
    "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
})  # fmt: skip
_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""Attributes that say which layers have biases, and the arrays that do."""
