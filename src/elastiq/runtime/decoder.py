"""One token through a plain decoder in one compiled call.

A decoder is plain if its blocks are a norm, attention with rotary embedding, a norm and a gated mlp under the names
that transformers gives them in Llama and its kin, and all their matrices are nested codes, at most behind a rotation of
their input. Whether it also computes what the names promise is not taken on trust: its first token goes both ways, and
only equal results let the compiled one go on.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.matmul.cpu import DIGITS
from ..linalg import native
from ..linalg.hadamard import description
from .linear import NestedLinear
from .nested import NestedMatrix
from .past import GrowingLayer

log = logging.getLogger("elastiq")

TOLERANCE = 1e-3
"""Relative difference up to which the two ways of computing a token count as equal."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_SHARED = (slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 7))
"""Which of `_matrices` are given the same input."""
_HEAD_NORMS = ("q_norm", "k_norm")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
_TURNS = 256  # positions whose rotary embedding is computed at once


def accelerate(model: nn.Module) -> None:
    """Let the plain decoders within `model` take single tokens through compiled code; all else stays as it is."""
    module: Any
    for module in model.modules():
        if native.module is not None and is_plain(module):
            module.compiled_step = None
            module.forward = MethodType(_accelerated(type(module).forward), module)


def is_plain(decoder: Any) -> bool:
    """Whether `decoder` has the structure that compiled code knows, in float32 on a CPU."""
    layers: Any = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        return False
    if _children(decoder) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not all(map(_is_plain_block, layers)):
        return False
    norms = [decoder.norm, *(norm for block in layers for norm in _norms(block) if norm is not None)]
    if not all(map(_is_norm, norms)) or len({_eps(norm) for norm in norms}) > 1:
        return False
    if getattr(decoder.rotary_emb, "rope_type", None) not in _FIXED_ROPE:
        return False
    attentions: list[Any] = [block.self_attn for block in layers]
    if len({(attention.head_dim, attention.scaling) for attention in attentions}) > 1:
        return False
    kinds = getattr(decoder.config, "layer_types", None)
    whole = set(kinds) == {"full_attention"} if kinds else getattr(decoder.config, "sliding_window", None) is None
    small = [tensor for module in [*norms, *chain(*map(_matrices, layers))] for tensor in module.parameters()]
    return whole and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in small)


def _is_plain_block(block: Any) -> bool:
    if _children(block) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return False
    attention, mlp = block.self_attn, block.mlp
    if _children(attention) not in ({*_PROJECTIONS}, {*_PROJECTIONS, *_HEAD_NORMS}):
        return False
    if _children(mlp) != {*_MLP, "act_fn"} or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return False
    has_own_rules = getattr(attention, "sliding_window", None) is not None or not hasattr(attention, "scaling")
    nested = all(isinstance(matrix, NestedLinear) and matrix.stored.coded for matrix in _matrices(block))
    return nested and not has_own_rules and _rotations(block) is not None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _norms(block: Any) -> list[Any]:
    """Norms of the hidden state, then of the heads, None where there is none."""
    heads = [getattr(block.self_attn, name, None) for name in _HEAD_NORMS]
    return [block.input_layernorm, block.post_attention_layernorm, *heads]


def _matrices(block: Any) -> list[Any]:
    return [getattr(block.self_attn, name) for name in _PROJECTIONS] + [getattr(block.mlp, name) for name in _MLP]


def _rotations(block: Any) -> list[Sequence[Tensor]] | None:
    """What each shared input goes through: a `Fold.rotation`, or nothing. None if compiled code does not know it."""
    matrices = _matrices(block)
    found = []
    for members in _SHARED:
        first, *others = map(_rotation, matrices[members])
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


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _accelerated(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, the forward of a decoder, with single tokens going through compiled code wherever that is the same."""

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or torch.compiler.is_compiling() or not _asks_for_one_token(self.config, kwargs):
            return plain(self, *args, **kwargs)
        step = self.compiled_step
        if step is None or not step.fits():
            step = self.compiled_step = CompiledStep(self)
        ids, position, cache = kwargs.get("input_ids"), kwargs.get("position_ids"), kwargs["past_key_values"]
        layers = _growing(cache)
        if step.equal is False or not step.takes(layers):
            return plain(self, **kwargs)
        x = self.embed_tokens(ids) if ids is not None else kwargs["inputs_embeds"]
        if type(x) is not Tensor or x.dtype != torch.float32 or x.requires_grad:
            return plain(self, **kwargs)
        where = layers[0].length if position is None else int(position)
        if step.equal is None:
            return step.compare(functools.partial(plain, self, **kwargs), x, layers, where)
        return BaseModelOutputWithPast(last_hidden_state=step.run(x, layers, where), past_key_values=cache)

    return forward


def _asks_for_one_token(config: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether these arguments ask for the next token of one sequence whose past is in a cache, and nothing else."""
    given = {name: value for name, value in kwargs.items() if value is not None and name != "use_cache"}
    cache, mask, position = (given.pop(name, None) for name in ("past_key_values", "attention_mask", "position_ids"))
    token = given.pop("input_ids" if "input_ids" in given else "inputs_embeds", None)
    wishes = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
    if any(name not in wishes or value is not wishes[name] for name, value in given.items()):
        return False
    if any(getattr(config, name, value) is not value for name, value in wishes.items()):
        return False
    if not isinstance(token, Tensor) or token.shape[:2] != (1, 1) or token.device.type != "cpu":
        return False
    if not isinstance(cache, Cache) or cache.offloading or not cache.layers:
        return False
    layers: list[Any] = cache.layers
    if not all(type(layer) in (DynamicLayer, GrowingLayer) and layer.get_seq_length() for layer in layers):
        return False
    if position is not None and position.numel() != 1:
        return False
    past = cache.get_seq_length()
    return mask is None or (isinstance(mask, Tensor) and mask.shape == (1, past + 1) and bool(mask.all()))


def _growing(cache: Cache) -> list[GrowingLayer]:
    """The layers of `cache`, replaced where they do not grow in place yet."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(layer)
    return cast(list[GrowingLayer], cache.layers)


class CompiledStep:
    """A plain decoder as compiled code, made from its modules as they are now.

    equal: whether it has been found to compute what the modules do; None before the first comparison.
    A copy or a pickle of it is None, because it holds addresses of this model's memory.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._changes = NestedMatrix.changes
        self._path = native.current()
        modules = [module for module in decoder.modules() if module is not decoder]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._parents = [module._modules for module in modules if module._modules]
        self._members = self._found()
        self._matrices = [module for module in modules if isinstance(module, NestedMatrix)]
        self._modes = self._activations()
        self._tensors = [tensor for module in modules for tensor in _outside_planes(module)]
        # Detached, so that the memory stays where other storage is put under one of the tensors.
        self._kept = [tensor.detach() for tensor in self._tensors]
        self._kept += [array.detach() for matrix in self._matrices for array in matrix.read_arrays()]
        self._tensors += [matrix._buffers["weight"] for matrix in self._matrices]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._first, self._turns = 0, (torch.empty(0), torch.empty(0))
        known = self._path != "torch" and len(self._modes) == 1 and not any(self._hooks) and is_plain(decoder)
        self._compiled: Any = None
        if known:
            try:
                self._compiled, rotations = _compile(decoder)
                self._kept += rotations
            except ValueError as error:  # what is plain may still have sizes that compiled code is not made for
                log.info("%s: %s; it keeps its own code", type(decoder).__name__, error)
                known = False
        self.equal: bool | None = None if known else False

    def fits(self) -> bool:
        """Whether everything it was made from is still as it was."""
        return (
            self._changes == NestedMatrix.changes
            and self._path == native.current()
            and self._modes == self._activations()
            and not any(self._hooks)
            and self._found() == self._members
            and [tensor.data_ptr() for tensor in self._tensors] == self._addresses
        )

    def takes(self, layers: list[GrowingLayer]) -> bool:
        """Whether a token can be appended to these layers of a cache."""
        attention = self._decoder.layers[0].self_attn
        form = (1, attention.k_proj.out_features // attention.head_dim, attention.head_dim, torch.float32)
        length = layers[0].length
        for layer in layers:
            layer.reserve(1)
        return len(layers) == len(self._decoder.layers) and all(
            layer.length == length > 0 and layer.form == form for layer in layers
        )

    def run(self, x: Tensor, layers: list[GrowingLayer], position: int) -> Tensor:
        """[1, 1, hidden] of the token x [1, 1, hidden] at `position`; its keys and values go into `layers`."""
        assert self._compiled is not None
        x, out = x.contiguous(), torch.empty_like(x)
        cosine, sine = self._turn(x, position)
        self._compiled.step(
            self._path,
            DIGITS[self._modes[0]],
            [buffer.data_ptr() for layer in layers for buffer in layer.reserve(1)],
            [layer.capacity for layer in layers],
            layers[0].length,
            cosine.data_ptr(),
            sine.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        for layer in layers:
            layer.length += 1
        return out

    def compare(self, plain: Callable[[], Any], x: Tensor, layers: list[GrowingLayer], position: int) -> Any:
        """What `plain` answers; afterwards `equal` says whether `run` answers and caches the same."""
        output = plain()
        theirs = [output.last_hidden_state, *(place.clone() for place in _places(layers))]
        for layer in layers:
            layer.crop(-1)
        ours = [self.run(x, layers, position), *_places(layers)]
        self.equal = all(map(_close, ours, theirs))
        for place, states in zip(_places(layers), theirs[1:], strict=True):
            place.copy_(states)
        if not self.equal:
            log.info("%s: not computed as its structure suggests; it keeps its own code", type(self._decoder).__name__)
        return output

    def _turn(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rotary] of a position."""
        if not self._first <= position < self._first + len(self._turns[0]):
            cosine, sine = self._decoder.rotary_emb(x, torch.arange(position, position + _TURNS)[None])
            self._first, self._turns = position, (cosine[0].contiguous(), sine[0].contiguous())
        cosine, sine = self._turns
        return cosine[position - self._first], sine[position - self._first]

    def _activations(self) -> list[str]:
        return list({matrix.activations for matrix in self._matrices})

    def _found(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(parent.values() for parent in self._parents))

    def __reduce__(self) -> Any:
        return type(None), ()


def _places(layers: list[GrowingLayer]) -> list[Tensor]:
    """Where the newest position's keys and values stand, as views."""
    return [states[:, :, -1] for layer in layers for states in (layer.keys, layer.values) if states is not None]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= TOLERANCE * b.norm())


def _outside_planes(module: nn.Module) -> list[Tensor]:
    """Tensors of a module apart from planes and scales, whose changes NestedMatrix counts."""
    buffers = [] if isinstance(module, NestedMatrix) else module.buffers(recurse=False)
    return [*module.parameters(recurse=False), *buffers]


def _compile(decoder: Any) -> tuple[Any, list[Tensor]]:
    """The native decoder and its rotations. It keeps addresses: of these, of gains, biases and planes."""
    attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
    size, rotary = attention.head_dim, 2 * len(decoder.rotary_emb.inv_freq)
    kept: list[Tensor] = []

    def address_of(rotation: Sequence[Tensor]) -> tuple[int, int, int]:
        if not rotation:
            return 0, 0, 0
        described, arrays = description(*rotation)
        kept.extend(arrays)
        return described

    blocks = [
        (
            tuple(0 if norm is None else norm.weight.data_ptr() for norm in _norms(block)),
            tuple((m.tiled().handle, 0 if m.bias is None else m.bias.data_ptr()) for m in _matrices(block)),
            tuple(address_of(rotation) for rotation in _rotations(block) or ()),
        )
        for block in decoder.layers
    ]
    compiled = native.module.Decoder(  # type: ignore[union-attr]
        [attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, rotary],
        float(attention.scaling),
        attention.q_proj.in_features,
        mlp.gate_proj.out_features,
        _eps(decoder.norm),
        decoder.norm.weight.data_ptr(),
        blocks,
    )
    return compiled, kept
