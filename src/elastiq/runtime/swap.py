"""Put nested modules in the place of a model's matrices."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.func import functional_call

from ..core import ElastiqError, Width
from .embedding import NestedEmbedding
from .experts import NestedExperts
from .linear import NestedLinear, TiedHead
from .mixed import MixedExperts, MixedLinear, Part
from .nested import NestedMatrix
from .stored import StoredMatrix

log = logging.getLogger("elastiq")

_EMPTY = "nothing_left"
"""Name of the parameter of a model without parameters."""


def swap(model: nn.Module, stored: StoredMatrix) -> None:
    """Replace the matrix that `stored` describes by an empty nested module; a head tied to an embedding follows it.
    Buffers of an embedding (a factor) must be real.

    Raises ElastiqError if the model has no such matrix, or one of another shape.
    """
    parent_name, _, leaf = stored.name.rpartition(".")
    original = _original(model, stored)
    weight = cast(nn.Parameter, original if isinstance(original, nn.Parameter) else original.weight)
    shape = tuple(weight.mT.shape if stored.transposed else weight.shape)
    if shape != stored.shape:
        raise ElastiqError(
            f"{stored.name}: the checkpoint holds {list(stored.shape)}, the model of config.json has {list(shape)}; "
            "the files do not belong together"
        )
    parent = model.get_submodule(parent_name)
    if stored.role == "embedding":
        _swap_embedding(model, parent, leaf, stored, weight)
    elif stored.fused:
        delattr(parent, leaf)
        setattr(parent, leaf, NestedExperts(stored, weight.dtype))
    else:
        setattr(parent, leaf, NestedLinear(stored, getattr(original, "bias", None), weight.dtype))


def nested_matrices(model: nn.Module) -> dict[str, NestedMatrix]:
    """Every nested matrix of the model by name."""
    found = (m for m in model.modules() if isinstance(m, NestedMatrix) and not isinstance(m, Part))
    return {module.stored.name: module for module in found}


def rearrange(model: nn.Module, name: str, width: Width) -> NestedMatrix:
    """Put an empty module for `width`, which is known to fit, in the place of a nested matrix held for another."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, leaf)
    stored, dtype = old.stored, old.dtype
    new: NestedMatrix
    with old._like.device:
        if stored.fused:
            new = MixedExperts(stored, dtype, width) if isinstance(width, str) else NestedExperts(stored, dtype)
        elif isinstance(width, str):
            new = MixedLinear(stored, old.bias, dtype, width)
        else:
            new = NestedLinear(stored, old.bias, dtype)
    setattr(parent, leaf, new)
    NestedMatrix.changes += 1
    return new


def keep_a_parameter(model: nn.Module) -> None:
    """Give a model whose every weight is nested one empty parameter, for transformers asks the first one for device and
    precision. No state_dict has it."""
    if next(model.parameters(), None) is None and (matrices := nested_matrices(model)):
        held = next(iter(matrices.values()))
        empty = torch.empty(0, dtype=held.dtype, device=held._like.device)
        model.register_parameter(_EMPTY, nn.Parameter(empty, requires_grad=False))
        model.register_state_dict_post_hook(_without_empty)


def _without_empty(model: nn.Module, state: dict[str, Any], *_: Any) -> None:
    state.pop(_EMPTY, None)


@torch.no_grad()
def embedding_factor(embedding: nn.Module, name: str) -> float:
    """What an embedding multiplies its rows by, tried on a narrow random table. Raises ElastiqError if it does anything
    else with them."""
    with torch.device("cpu"):  # transformers loads models with meta as the default
        table = torch.randn(len(embedding.get_parameter("weight")), 8, generator=torch.Generator("cpu").manual_seed(0))
        table[0] = 1.0
        ids = torch.arange(min(4, len(table)))[None]
        wanted, factor = table[ids], math.nan
        try:
            rows = functional_call(embedding, {"weight": table}, (ids,))
            if rows.shape == wanted.shape:
                factor = float(rows[0, 0, 0])
        except Exception as error:
            log.debug("%s: cannot be called with a narrow table: %s", type(embedding).__name__, error)
    if not math.isfinite(factor) or not torch.allclose(rows, factor * wanted, rtol=1e-4, atol=1e-6):
        raise ElastiqError(
            f"{name}: {type(embedding).__name__} is an embedding of its own kind; keep it in 16 bits"
        )
    return factor


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers the model holds, embeddings and unread planes included, shared ones once."""
    arrays = [*model.parameters(), *model.buffers()]
    return sum({(a.device, a.data_ptr()): a.nbytes for a in arrays if a.numel()}.values())


def bits_per_weight(model: nn.Module) -> float:
    """Stored bits that the quantized matrices read at their widths (planes, scales, zero points) per weight."""
    matrices = nested_matrices(model).values()
    if not matrices:
        raise ElastiqError("bits_per_weight: the model has no quantized matrices; load one with elastiq.load")
    used = sum(matrix.stored.num_bits(matrix.bits) for matrix in matrices)
    return used / sum(matrix.stored.num_weights for matrix in matrices)


def _original(model: nn.Module, stored: StoredMatrix) -> nn.Parameter | nn.Module:
    try:
        if stored.fused:
            return model.get_parameter(stored.name)
        module = model.get_submodule(stored.name)
    except AttributeError:
        module = None
    if module is None or not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise ElastiqError(
            f"{stored.name}: the model of config.json has no such matrix; the files do not belong together"
        )
    return module


def _swap_embedding(model: nn.Module, parent: nn.Module, leaf: str, stored: StoredMatrix, weight: nn.Parameter) -> None:
    original = getattr(parent, leaf)
    nested = NestedEmbedding(stored, weight.dtype, embedding_factor(original, stored.name))
    heads = [(n, m) for n, m in model.named_modules() if m is not original and getattr(m, "weight", None) is weight]
    setattr(parent, leaf, nested)
    for name, head in heads:
        head_parent, _, head_leaf = name.rpartition(".")
        setattr(model.get_submodule(head_parent), head_leaf, TiedHead(nested, getattr(head, "bias", None)))
    # transformers would look for a weight
    model.resize_token_embeddings = partial(_refuse_resize, stored.name)  # type: ignore[assignment]


def _refuse_resize(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ElastiqError(
        f"{name}: a quantized embedding table keeps its size; resize the 16-bit model and quantize that, or quantize "
        "without --embeddings"
    )
