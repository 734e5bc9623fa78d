"""The module tree of a model without its weights, and weights for a part of it at a time."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ..core import Edits, ElastiqError, library_errors
from .source import ModelSource
from .weight_map import WeightMap

NO_EDITS: Edits = {}
_MAPS: WeakKeyDictionary[PreTrainedModel, WeightMap] = WeakKeyDictionary()


def build_skeleton(source: ModelSource, dtype: torch.dtype, edits: Edits = NO_EDITS) -> PreTrainedModel:
    """The model in eval mode with every parameter on the meta device in `dtype`; buffers are real.

    edits: what becomes of parameters, by name, when their weights are read. Tied parameters are one object, unless the
    checkpoint holds different weights for them or they are edited in different ways. Experts of
    mixture-of-experts models run one after another ("eager"), attention as the family's default. Raises ElastiqError
    for what is not a causal language model that transformers itself implements.
    """
    config = copy.deepcopy(source.config)
    _refuse(source)
    config.use_cache = False
    config._experts_implementation = "eager"
    version = transformers.__version__
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ElastiqError(
            f"{source.path}: transformers {version} has no causal language model for the architecture "
            f"{config.model_type!r}"
        )
    what = f"{source.path}: transformers {version} makes no model of its config.json"
    with library_errors(what, "mend that value"), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    _check_class(source, model)
    model.eval().requires_grad_(False)
    model.tie_weights()
    weights = WeightMap(model, source, dtype, edits, {})
    apart = _untie_different(model, weights)
    if apart:
        weights = WeightMap(model, source, dtype, edits, {n: o for n, o in apart.items() if n not in weights})
    _MAPS[model] = weights
    return model


def load_module(
    model: PreTrainedModel,
    name: str,
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    recurse: bool = True,
) -> None:
    """Give every parameter and buffer under the module `name` ("" is the whole model) its values.

    Parameters that are already loaded are left alone; a tied parameter is loaded under all its names. Floating-point
    parameters come in `dtype`. recurse=False: only what the module itself owns. Raises ElastiqError naming the tensor
    that is missing, unreadable, misshapen or not finite.
    """
    weights = _map(model, source)
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    pending = [
        prefix + key
        for key, parameter in module.named_parameters(recurse=recurse, remove_duplicate=False)
        if parameter.is_meta
    ]
    stored = [prefix + key for key, _ in module.named_buffers(recurse=recurse) if prefix + key in weights]
    for key, tensor in weights.read(_readable(pending, weights) + stored, dtype, model):
        _put(model, weights.tied.get(key, (key,)), tensor.to(device), source)
    for part in module.modules() if recurse else (module,):
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = buffer.to(device)


def read_parameter(model: PreTrainedModel, name: str, source: ModelSource) -> torch.Tensor:
    """The parameter `name` from the checkpoint, float32 on the CPU, whatever the model computes in."""
    (tensor,) = (t for n, t in _map(model, source).read([name], torch.float32, model) if n == name)
    return tensor


def free_module(model: PreTrainedModel, name: str) -> None:
    """Put every parameter under the module `name` back to the meta device; ties are kept."""
    prefix = f"{name}." if name else ""
    for key in [prefix + key for key, _ in model.get_submodule(name).named_parameters(remove_duplicate=False)]:
        free_parameter(model, key)


def free_parameter(model: PreTrainedModel, name: str) -> None:
    """Put one parameter back to the meta device, under all its tied names."""
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for alias in _MAPS[model].tied.get(name, (name,)) if model in _MAPS else (name,):
            _set(model, alias, empty)


def _map(model: PreTrainedModel, source: ModelSource) -> WeightMap:
    if model not in _MAPS or _MAPS[model].source is not source:
        raise ValueError("load_module takes the model and the source that build_skeleton was called with")
    return _MAPS[model]


def _readable(names: Iterable[str], weights: WeightMap) -> list[str]:
    """For each parameter the one of its tied names that the checkpoint holds; each only once."""
    found: list[str] = []
    for name in names:
        choice = next((alias for alias in weights.tied.get(name, ()) if alias in weights), name)
        if choice not in found:
            found.append(choice)
    return found


def _put(model: PreTrainedModel, names: Iterable[str], tensor: torch.Tensor, source: ModelSource) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        parent, _, key = name.rpartition(".")
        module = model.get_submodule(parent)
        expected = getattr(module, key)
        if expected.shape != tensor.shape:
            raise ElastiqError(
                f"{source.path}: {name} has the shape {list(tensor.shape)} in the checkpoint where config.json "
                f"says {list(expected.shape)}"
            )
        if key in module._buffers:
            module._buffers[key] = tensor
        else:
            module._parameters[key] = parameter


def _set(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._parameters[key] = parameter


def _untie_different(model: PreTrainedModel, weights: WeightMap) -> dict[str, str]:
    """Separate tied parameters that the checkpoint holds different tensors for, or that are edited in different ways:
    their names, and those of the ones they were tied to, which the checkpoint holds."""
    apart: dict[str, str] = {}
    for names in sorted(set(weights.tied.values())):
        first = next((name for name in names if name in weights), names[0])
        for other in names:
            edited = weights.edits.get(first) != weights.edits.get(other)
            stored = first in weights and other in weights and not weights.same_values(first, other, model)
            if other != first and (edited or stored):
                own = torch.empty_like(model.get_parameter(other), device="meta")
                _set(model, other, nn.Parameter(own, requires_grad=False))
                apart[other] = first
    return apart


def _refuse(source: ModelSource) -> None:
    config = source.config
    if getattr(config, "is_encoder_decoder", False):
        raise ElastiqError(
            f"{source.path}: {config.model_type!r} is an encoder-decoder model; only causal language models are handled"
        )


def _check_class(source: ModelSource, model: PreTrainedModel) -> None:
    """A configuration alone does not say that the checkpoint is a language model; its architectures entry does."""
    said = source.config.architectures or []
    names = [str(name) for name in (said if isinstance(said, list) else [said])]
    known = [n for n in names if n == type(model).__name__ or "CausalLM" in n or "LMHead" in n]
    if names and not known:
        raise ElastiqError(
            f"{source.path}: the architecture {names[0]} is not a causal language model (that would be "
            f"{type(model).__name__})"
        )


def give_back_memory() -> None:
    """Return freed memory to the system.

    The C library keeps it in pieces otherwise, and the process grows from block to block and from batch to batch.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it, and only glibc needs it
        if trim is not None:
            trim(0)
