"""Which decoders compiled code knows, and why not the others.

A decoder is plain if its blocks are a norm, attention with rotary embedding, a norm and a gated mlp under the names
that transformers gives them in Llama and its kin, and nothing in its configuration scales by position or magnitude;
compiled code takes it if all its matrices are nested codes besides, at most behind a rotation of their input. An
objection is the rest of a sentence about the decoder: "it has ...".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .linear import NestedLinear

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SHARED = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))
"""Which of `matrices` are given the same input."""
_HEAD_NORMS = ("q_norm", "k_norm")
_DECODER = ("embed_tokens", "layers", "norm", "rotary_emb")
_BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that turn a position by the same angles however long the text is."""
_ROPE = ("rope_parameters", "rope_scaling")
"""Names under which configurations describe the rotary embedding."""
_KNOWN_IN_ROPE = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor",
    "high_freq_factor",
}  # fmt: skip
"""What these embeddings are made from, all of which is in the table of cosines and sines."""
_HEAD_STEP, _MOST_HEAD = 16, 512
"""Channels of a head, as in native/decoder.cpp."""
_SCALES = re.compile(
    r"(^|_)(re|un)?(scal\w*|multipliers?|temperature|clip\w*|clamp\w*|(soft)?cap|(soft)?capping|limits?|chunk\w*|sinks?"
    r"|alibi|no_rope\w*|nope\w*)(_|$)"
)
"""Words in the names of what makes scores or values depend on position or magnitude."""


def decoders(model: nn.Module) -> Iterator[Any]:
    """Modules within `model` that hold token embeddings and a list of blocks, as decoders of transformers do."""
    for module in model.modules():
        layers, embedding = (getattr(module, name, None) for name in ("layers", "embed_tokens"))
        if isinstance(layers, nn.ModuleList) and layers and isinstance(embedding, nn.Module):
            yield module


def objection(decoder: Any) -> str | None:
    """Why compiled code does not take the tokens of `decoder` as it is held now; None if it does."""
    return unlike(decoder) or _held_otherwise(decoder)


def unlike(decoder: Any) -> str | None:
    """Why `decoder` is not plain, whatever holds its matrices; None if it is."""
    if reason := _other_parts(decoder, _DECODER):
        return reason
    for index, block in enumerate(decoder.layers):
        if reason := _unlike_block(block):
            return f"in block {index} {reason}"
    every_norm = _all_norms(decoder)
    if strange := next((norm for norm in every_norm if not _is_norm(norm)), None):
        return f"it has a {type(strange).__name__}, which is no RMS norm with one gain"
    if len({eps(norm) for norm in every_norm}) > 1:
        return "its norms add different numbers to the variance"
    if (kind := getattr(decoder.rotary_emb, "rope_type", None)) not in _FIXED_ROPE:
        return f"it has a rotary embedding of the kind {kind!r}, and {', '.join(_FIXED_ROPE)} are known"
    attentions: list[Any] = [block.self_attn for block in decoder.layers]
    if len({(attention.head_dim, attention.scaling) for attention in attentions}) > 1:
        return "its blocks have heads of different sizes or scalings"
    if (size := attentions[0].head_dim) % _HEAD_STEP or not 0 < size <= _MOST_HEAD:
        return f"its heads have {size} channels, and multiples of {_HEAD_STEP} up to {_MOST_HEAD} are known"
    return _window(decoder.config) or _scaled(decoder.config)


def _held_otherwise(decoder: Any) -> str | None:
    for index, block in enumerate(decoder.layers):
        for name, matrix in zip((*_PROJECTIONS, *_MLP), matrices(block), strict=True):
            if not (isinstance(matrix, NestedLinear) and matrix.stored.coded):
                return f"in block {index} {name} is no matrix of nested codes read at one width"
        if rotations(block) is None:
            return f"in block {index} a matrix has more than codes and a rotation that it shares with its neighbours"
    every = [*_all_norms(decoder), *chain.from_iterable(map(matrices, decoder.layers))]
    for tensor in (tensor for module in every for tensor in module.parameters()):
        if tensor.dtype != torch.float32 or tensor.device.type not in ("cpu", "meta"):
            found = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
            return f"it computes in {found}, not in float32 on a CPU"
    return None


def _unlike_block(block: Any) -> str | None:
    if reason := _other_parts(block, _BLOCK):
        return reason
    attention, mlp = block.self_attn, block.mlp
    if _other_parts(attention, _PROJECTIONS) and (reason := _other_parts(attention, (*_PROJECTIONS, *_HEAD_NORMS))):
        return reason
    if reason := _other_parts(mlp, (*_MLP, "act_fn")):
        return reason
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"the mlp is gated by {type(mlp.act_fn).__name__}, not by SiLU"
    if getattr(attention, "sliding_window", None) is not None:
        return f"attention has a window (sliding_window={attention.sliding_window})"
    if not hasattr(attention, "scaling") or not hasattr(attention, "head_dim"):
        return f"{type(attention).__name__} does not say how it scales or what its heads are"
    return None


def _other_parts(module: nn.Module, expected: Sequence[str]) -> str | None:
    found = [name for name, _ in module.named_children()]
    if set(found) == set(expected):
        return None
    return f"{type(module).__name__} consists of {', '.join(found) or 'nothing'}, not of {', '.join(expected)}"


def _window(config: Any) -> str | None:
    kinds, width = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds:
        other = next((kind for kind in kinds if kind != "full_attention"), None)
        return None if other is None else f"it has blocks with {other}"
    return None if width is None else f"its attention has a window (sliding_window={width})"


def _scaled(config: Any) -> str | None:
    """What in the configuration may scale by position or magnitude: equal at one token, it need not be at another."""
    for name, value in config.to_dict().items():
        if name in _ROPE and isinstance(value, dict):
            strange = [(f"{name}.{key}", found) for key, found in value.items() if key not in _KNOWN_IN_ROPE]
        else:
            strange = [(name, value)] if _SCALES.search(name) and name not in _ROPE else []
        for where, found in strange:
            if not _is_neutral(found):
                return f"its configuration has {where}={found!r}, which may scale by position or magnitude"
    return None


def _is_neutral(value: Any) -> bool:
    """Whether a setting says that nothing is scaled, cut or left out."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_neutral, value)) and all(one == value[0] for one in value)
    return value is None or value is False or (type(value) in (int, float) and value in (0, 1)) or value == {}


def norms(block: Any) -> list[Any]:
    """Norms of the hidden state, then of the heads, None where there is none."""
    heads = [getattr(block.self_attn, name, None) for name in _HEAD_NORMS]
    return [block.input_layernorm, block.post_attention_layernorm, *heads]


def _all_norms(decoder: Any) -> list[Any]:
    return [decoder.norm, *(norm for block in decoder.layers for norm in norms(block) if norm is not None)]


def matrices(block: Any) -> list[Any]:
    """Query, key, value, out, gate, up, down."""
    return [getattr(block.self_attn, name) for name in _PROJECTIONS] + [getattr(block.mlp, name) for name in _MLP]


def rotations(block: Any) -> list[Sequence[Tensor]] | None:
    """What each shared input goes through: a `Fold.rotation`, or nothing. None if compiled code does not know it."""
    every = matrices(block)
    found = []
    for members in _SHARED:
        first, *others = map(_rotation, every[members])
        if first is None or any(other is None or not _same(first, other) for other in others):
            return None
        found.append(first)
    return found


def _rotation(matrix: NestedLinear) -> Sequence[Tensor] | None:
    powers, folds, terms = matrix.restored()
    if powers is not None or terms or len(folds) > 1:
        return None
    rotation = folds[0].rotation() if folds else ()
    return rotation if not rotation or len(rotation[0]) == matrix.in_features else None


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _is_norm(module: Any) -> bool:
    if not hasattr(module, "variance_epsilon") and not hasattr(module, "eps"):
        return False
    return type(module).__name__.endswith("RMSNorm") and [name for name, _ in module.named_parameters()] == ["weight"]


def eps(norm: Any) -> float:
    """What a norm adds to the variance."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
