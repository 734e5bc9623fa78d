"""One token through a plain decoder in one compiled call.

`plain` says which decoders are plain. Whether one also computes what its names promise is not taken on trust: its first
token goes both ways, and again the first one of every doubling of the position; only equal results let the compiled way
go on.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..kernels.matmul.cpu import DIGITS
from ..linalg import native
from ..linalg.hadamard import description
from .interface import cache_argument
from .nested import NestedMatrix
from .past import GrowingLayer
from .plain import decoders, eps, matrices, norms, objection, rotations, unlike

log = logging.getLogger("elastiq")

TOLERANCE = 1e-3
"""Relative difference up to which the two ways of computing a token count as equal."""

COMPILED = "compiled code"
"""What `token_way` answers where single tokens do not take the modules."""

_ABSENT = "compiled code is absent" if native.module is None else None
_TURNS = 256  # positions whose rotary embedding is computed at once
_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""What the forward of a decoder has to call its inputs."""
_WISHES = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""Settings of a call under which its answer is what compiled code gives."""


def accelerate(model: nn.Module) -> None:
    """Let the plain decoders within `model` take single tokens through compiled code; all else stays as it is."""
    for module in decoders(model):
        forward = type(module).forward
        if reason := _ABSENT or objection(module):
            _say(logging.INFO, module, reason)
        elif reason := _unknown_interface(forward):
            _say(logging.WARNING, module, reason)
        else:
            module.compiled_step = None
            module.forward = MethodType(_accelerated(forward), module)


def expected_way(model: nn.Module, nested: bool = True) -> str:
    """What `token_way` will answer for a model in float32 on a CPU, as far as its structure and its settings tell.

    nested: its matrices are nested modules already; otherwise they will be.
    """
    for decoder in decoders(model):
        reason = _no_compiled_code() or (objection(decoder) if nested else unlike(decoder))
        return _way(reason or _unknown_interface(type(decoder).forward))
    return _way("it has no decoder of the kind of Llama")


@torch.no_grad()
def token_way(model: nn.Module) -> str:
    """Which way single tokens of `model` take: "compiled code", or "modules: " and why. Two tokens are tried."""
    for decoder in decoders(model):
        if not hasattr(decoder, "compiled_step"):
            return expected_way(model)
        cache = {str(cache_argument(type(decoder).forward)): DynamicCache(config=decoder.config)}
        for _ in range(2):
            decoder(input_ids=torch.zeros(1, 1, dtype=torch.int64), **cache)
        step = decoder.compiled_step
        return _way("its settings ask for more than a hidden state" if step is None else step.reason)
    return expected_way(model)


def _way(reason: str | None) -> str:
    return COMPILED if reason is None else f"modules: {reason}"


def _no_compiled_code() -> str | None:
    return _ABSENT or ("the path in use is plain torch" if native.current() == "torch" else None)


def _unknown_interface(forward: Callable[..., Any]) -> str | None:
    """Why single tokens cannot be told from the arguments of `forward`; None if they can."""
    absent = [name for name in _ARGUMENTS if name not in inspect.signature(forward).parameters]
    if absent:
        return f"its forward has no argument {' and no '.join(absent)} in this version of transformers"
    if cache_argument(forward) is None:
        return "its forward has no argument for a cache in this version of transformers"
    return None


@functools.lru_cache(maxsize=256)
def _say_once(level: int, sentence: str) -> None:
    log.log(level, sentence)


def _say(level: int, decoder: nn.Module, reason: str) -> None:
    """Log, once, why single tokens take the modules."""
    _say_once(level, f"{type(decoder).__name__}: single tokens take its modules, not compiled code: {reason}")


def _accelerated(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, the forward of a decoder, with single tokens going through compiled code wherever that is the same."""
    cache_name = str(cache_argument(plain))
    names = list(inspect.signature(plain).parameters)[1:]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return plain(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given.get(cache_name)
        if not _is_token(given) or not isinstance(cache, Cache) or not cache.get_seq_length():
            return plain(self, *args, **kwargs)
        reason = _other_wish(self.config, given, cache_name) or _other_past(cache, given)
        if reason is not None:
            _say(logging.INFO, self, reason)
            return plain(self, *args, **kwargs)
        step = self.compiled_step
        if step is None or not step.fits():
            step = self.compiled_step = CompiledStep(self)
        ids = given.get("input_ids")
        x = self.embed_tokens(ids) if ids is not None else given["inputs_embeds"]
        if step.equal is False or type(x) is not Tensor or x.dtype != torch.float32 or x.requires_grad:
            return plain(self, *args, **kwargs)
        layers = _growing(cache)
        if not step.takes(layers):
            _say(logging.INFO, self, "the cache is not one of this model's blocks and one sequence in float32")
            return plain(self, *args, **kwargs)
        position = given.get("position_ids")
        where = layers[0].length if position is None else int(position)
        if not step.compared_at(where):
            return step.compare(functools.partial(plain, self, *args, **kwargs), x, layers, where, cache)
        return step.answer(step.run(x, layers, where), cache)

    return forward


def _is_token(given: Mapping[str, Any]) -> bool:
    """Whether the arguments hold one token of one sequence, on a CPU."""
    tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
    return len(tokens) == 1 and tokens[0].shape[:2] == (1, 1) and tokens[0].device.type == "cpu"


def _other_wish(config: Any, given: Mapping[str, Any], cache_name: str) -> str | None:
    """What is asked for beyond the next token of a sequence whose past is in a cache; None if nothing."""
    for name, value in given.items():
        if value is None or name in (*_ARGUMENTS, cache_name) or (name == "use_cache" and value is True):
            continue
        if name not in _WISHES or value is not _WISHES[name]:
            return f"it was called with {name}"
    set_otherwise = (name for name, value in _WISHES.items() if getattr(config, name, value) is not value)
    return next((f"its configuration sets {name}" for name in set_otherwise), None)


def _other_past(cache: Cache, given: Mapping[str, Any]) -> str | None:
    """What keeps a token from being appended to this past; None if nothing."""
    layers: list[Any] = cache.layers
    if getattr(cache, "offloading", False):
        return "the cache is moved between devices"
    if other := next((layer for layer in layers if type(layer) not in (DynamicLayer, GrowingLayer)), None):
        return f"the cache has a {type(other).__name__}"
    if not all(layer.get_seq_length() for layer in layers):
        return "the cache has an empty layer"
    mask, position = given.get("attention_mask"), given.get("position_ids")
    if position is not None and position.numel() != 1:
        return "its token has several positions"
    if mask is None or (isinstance(mask, Tensor) and mask.shape == (1, cache.get_seq_length() + 1) and mask.all()):
        return None
    return "the attention mask hides something"


def _growing(cache: Cache) -> list[GrowingLayer]:
    """The layers of `cache`, replaced where they do not grow in place yet."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(layer)
    return cast(list[GrowingLayer], cache.layers)


class CompiledStep:
    """A plain decoder as compiled code, made from its modules as they are now.

    equal: whether it has been found to compute what the modules do; None before the first comparison. reason: why it is
    not taken, where it is not.
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
        first_planes = (matrix._buffers.get("weight") for matrix in self._matrices)  # rows of several widths have none
        self._tensors += [plane for plane in first_planes if plane is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._table = 0, torch.empty(0), torch.empty(0)  # first position, cosines and sines from there on
        self._compared: set[int] = set()  # doublings of the position at which both ways were found equal
        self._compiled: Any = None
        self._form: tuple[Callable[..., Any], tuple[str, ...]] | None = None
        self.reason = _no_compiled_code() or self._changed() or objection(decoder)
        self.equal: bool | None = None if self.reason is None else False
        if self.reason is None:
            try:
                self._compiled, arrays = _compile(decoder)
                self._kept += arrays
            except ValueError as error:  # what is plain may still have sizes that compiled code is not made for
                self.equal, self.reason = False, f"it is not made for its sizes ({error})"
        if self.reason is not None:
            _say(logging.INFO, decoder, self.reason)

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
            layer.length == length > 0 and layer.form == form and not layer.keeps_gradients for layer in layers
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

    def compared_at(self, position: int) -> bool:
        """Whether both ways were found equal since the position last doubled (1, 2, 4, ...) before `position`."""
        return position.bit_length() in self._compared

    def compare(
        self, plain: Callable[[], Any], x: Tensor, layers: list[GrowingLayer], position: int, cache: Cache
    ) -> Any:
        """What `plain` answers; afterwards `equal` says whether `run` answers and caches the same."""
        output = plain()
        self._form = _form(output, cache)
        if self._form is None:
            self._refuse("its answer has another form than a hidden state and a cache")
            return output
        theirs = [output.last_hidden_state, *(place.clone() for place in _places(layers))]
        for layer in layers:
            layer.crop(-1)
        ours = [self.run(x, layers, position), *_places(layers)]
        difference = max(map(_difference, ours, theirs))
        self.equal = difference <= TOLERANCE
        for place, states in zip(_places(layers), theirs[1:], strict=True):
            place.copy_(states)
        if self.equal:
            self._compared.add(position.bit_length())
        else:
            self._refuse(f"at position {position} the two differ by {difference:.2g} of the values")
        return output

    def answer(self, hidden: Tensor, cache: Any) -> Any:
        """What the decoder's own forward answers around `hidden`."""
        assert self._form is not None
        kind, names = self._form
        return kind(last_hidden_state=hidden, **dict.fromkeys(names, cache))

    def _refuse(self, reason: str) -> None:
        self.equal, self.reason = False, reason
        _say(logging.WARNING, self._decoder, reason)

    def _changed(self) -> str | None:
        """What was done to the modules that only they can answer to; None if nothing."""
        if any(self._hooks):
            return "its modules have hooks"
        return None if len(self._modes) == 1 else "its matrices read their inputs in different ways"

    def _turn(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [rotary] of a position."""
        first, cosine, sine = self._table  # read once: another thread may put another one there
        if not first <= position < first + len(cosine):
            found = self._decoder.rotary_emb(x, torch.arange(position, position + _TURNS)[None])
            first, cosine, sine = self._table = position, *(table[0].contiguous() for table in found)
        return cosine[position - first], sine[position - first]

    def _activations(self) -> list[str]:
        return list({matrix.activations for matrix in self._matrices})

    def _found(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(parent.values() for parent in self._parents))

    def __reduce__(self) -> Any:
        return type(None), ()


def _places(layers: list[GrowingLayer]) -> list[Tensor]:
    """Where the newest position's keys and values stand, as views."""
    return [states[:, :, layer.length - 1] for layer in layers for states in layer.reserve(0)]


def _difference(a: Tensor, b: Tensor) -> float:
    """Relative difference of `a` from `b`; infinite where it is not a number."""
    found = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return found if found == found else float("inf")


def _form(output: Any, cache: Any) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
    """How to make an output of this kind: its class, and the names under which it holds the cache."""
    if not isinstance(output, Mapping) or "last_hidden_state" not in output:
        return None
    names = tuple(name for name, value in output.items() if value is cache)
    return (type(output), names) if len(output) == 1 + len(names) else None


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
            tuple(0 if norm is None else norm.weight.data_ptr() for norm in norms(block)),
            tuple((m.tiled().handle, 0 if m.bias is None else m.bias.data_ptr()) for m in matrices(block)),
            tuple(address_of(rotation) for rotation in rotations(block) or ()),
        )
        for block in decoder.layers
    ]
    compiled = native.module.Decoder(  # type: ignore[union-attr]
        [attention.q_proj.out_features // size, attention.k_proj.out_features // size, size, rotary],
        float(attention.scaling),
        attention.q_proj.in_features,
        mlp.gate_proj.out_features,
        eps(decoder.norm),
        decoder.norm.weight.data_ptr(),
        blocks,
    )
    return compiled, kept
