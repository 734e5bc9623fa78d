"""The flow of hidden states through a model with one block in memory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .. import statistics  # noqa: F401  (they register themselves)
from ..core import Edits, ElastiqError, Site, Statistic, Stats, TokenWeights
from ..models import Layout, ModelSource, free_module, give_back_memory, load_module, read_parameter
from ..text import check_ids
from .objective import BlockObjective
from .products import ExpertProducts, Products

log = logging.getLogger("elastiq")

TOKENS_PER_BATCH = 1024
"""Windows pass through a block together up to this many tokens."""


@dataclass(frozen=True)
class _Call:
    """What the model hands to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        if self.by_keyword:
            out = block(*self.args, hidden_states=hidden, **self.kwargs)
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple | list) else out


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


_FILLER = object()
"""Stands for what a block returns besides hidden states."""
_RETURNS: tuple[tuple[Any, ...] | None, ...] = (None, *((_FILLER,) * extra for extra in range(4)))
"""Ways in which blocks return hidden states: alone, or first in a tuple with some more."""


class BlockStream:
    """Hidden states of all calibration windows, moving through the model one block at a time.

    The order of calls is, for each block in turn, `weights` and `collect` as wanted (both optional), then `advance`;
    after the last block `final_stats` or `logits`. At any time only one block, its statistics and the hidden states
    are held; the latter, float32, go to a file in `spill_dir` (default: the system's folder for temporary files) when
    they take more than `memory_limit` bytes. The same calls give the same numbers, whether or not statistics are
    collected, so a resumed run equals an uninterrupted one.

    model, source, layout: of build_skeleton, ModelSource and discover. ids: int64 [windows, seq_len]. needs: names
    of statistics. dtype, device: of the arithmetic. token_weights: as in `Recipe`; a model whose attention they look
    at must have attention that returns its probabilities ("eager").
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        layout: Layout,
        ids: Tensor,
        needs: frozenset[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        spill_dir: Path | None = None,
        memory_limit: int = 2**30,
        token_weights: TokenWeights | None = None,
    ) -> None:
        _check_ids(model, ids)
        self.layout = layout
        self.needs = needs
        self.block = 0
        self._model, self._source, self._ids = model, source, ids
        self._dtype, self._device = dtype, device
        self._weights = token_weights if any(Statistic.registry[name].weighted for name in needs) else None
        self._backward = self._weights is not None and self._weights.gradients
        self._spill_dir, self._memory_limit = spill_dir, memory_limit
        self._blocks = [model.get_submodule(name) for name in layout.blocks]
        self._calls: dict[int, list[_Call]] = {}
        self._more: tuple[Any, ...] | None = None
        self._outputs: Tensor | None = None
        self._done = False
        self._inputs = self._embed()

    def weights(self, block: int) -> Mapping[str, Tensor]:
        """Site name -> its weight, a new float32 tensor [out, in] at every look-up. Block -1: embedding and head."""
        if block != -1:
            self._load(block)
        return _Weights(self, self.layout.at(block))

    def collect(self, block: int) -> dict[str, Stats]:
        """Site name -> statistics of its input, from one pass over all windows.

        Sites with one input_id share one Stats object, unless token weights look at gradients, which every site has its
        own of.
        The statistics of an expert are of the tokens routed to it.
        """
        self._load(block)
        sites = self.layout.at(block)
        owner = {site.name: site.name if self._backward else site.input_id for site in sites}
        stats = {s.name: Stats.empty(s.shape[1], self.needs, self._device) for s in sites if owner[s.name] == s.name}
        products = Products(stats, self._weights)
        with ExitStack() as hooks:
            for module in self._blocks[block].modules() if self._weights and self._weights.attention else ():
                hooks.callback(module.register_forward_hook(products.of_attention).remove)
            for site in sites:
                if site.expert is None and site.name in stats:
                    hook = partial(products.of_module, site.name)
                    hooks.callback(self._model.get_submodule(site.name).register_forward_hook(hook).remove)
            if any(site.expert is not None for site in sites):
                hooks.enter_context(ExpertProducts(self._model, sites, products))
            self._forward(products)
        return {site.name: stats[owner[site.name]] for site in sites}

    def output_energy(self, block: int) -> float:
        """Median over the tokens of the squared norm of the block's output, after `collect`: few tokens have norms
        many times the usual one, and a mean would speak of them alone."""
        self._check_order(block)
        if not self._done or self._outputs is None:
            raise ValueError("output_energy is known after collect")
        return float(self._outputs.flatten(2).square().sum(dim=-1).median())

    def parameters(self, block: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the block's parameters by their names in the model."""
        self._check_order(block)
        prefix = self.layout.blocks[block]
        return {name: tuple(p.shape) for name, p in self._blocks[block].named_parameters(prefix=prefix)}

    def parameter(self, block: int, name: str) -> Tensor:
        """A copy of one of them, float32."""
        self._load(block)
        return self._model.get_parameter(name).detach().to(torch.float32, copy=True)

    def unchanged(self, block: int, factors: Mapping[str, Tensor], tolerance: float = 0.01) -> bool:
        """Whether the block adds the same to every hidden state of a batch, but for a part of `tolerance`, with some of
        its parameters multiplied by `factors`."""
        return self._unchanged(block, lambda name, values: values * factors[name].to(values), factors, tolerance)

    def unedited(self, block: int, edits: Edits, tolerance: float = 0.01) -> bool:
        """The same with those of `edits` that the block has."""
        own = [name for name in edits if name in self.parameters(block)]
        return self._unchanged(
            block, lambda name, v: edits[name].apply(v.float(), self._model.get_parameter).to(v), own, tolerance
        )

    @torch.no_grad()
    def _unchanged(
        self, block: int, change: Callable[[str, Tensor], Tensor], names: Iterable[str], tolerance: float
    ) -> bool:
        self._load(block)
        start, stop = next(self._batches())
        call, module = self._calls[stop - start][block], self._blocks[block]
        before = call.run(module, self._batch(start, stop))
        kept = {name: self._model.get_parameter(name) for name in names}
        values = {name: parameter.data for name, parameter in kept.items()}
        try:
            for name, parameter in kept.items():
                parameter.data = change(name, values[name])
            after = call.run(module, self._batch(start, stop))
        finally:
            for name, parameter in kept.items():
                parameter.data = values[name]
        added = (before - self._batch(start, stop)).flatten(2).norm(dim=-1)
        return bool(((after - before).flatten(2).norm(dim=-1) <= tolerance * added).all())

    def objective(
        self,
        block: int,
        originals: Mapping[str, Tensor],
        beside: Mapping[str, Tensor],
        called: Callable[[int], None],
    ) -> BlockObjective:
        """The distance of the block's outputs from those that `collect` found. beside: new values of parameters that
        are not quantized, by name. originals, called: as in `BlockObjective`."""
        self._check_order(block)
        if not self._done or self._outputs is None:
            raise ValueError("the objective is known after collect")
        if 1 not in self._calls:
            with torch.no_grad(), self._loading_on_call():
                self._calls[1] = self._calls_of_all_blocks(self._ids[:1].to(self._device))[1]
        call, module = self._calls[1][block], self._blocks[block]

        own = {name.removeprefix(f"{self.layout.blocks[block]}."): values for name, values in beside.items()}

        def run(window: int, parameters: Mapping[str, Tensor]) -> Tensor:
            replaced = partial(_with, module, {**own, **parameters})
            return call.run(replaced, self._batch(window, window + 1))[0]

        sites, name = self.layout.at(block), self.layout.blocks[block]
        return BlockObjective(sites, name, run, self._outputs, originals, self._dtype, self._device, called)

    @torch.no_grad()
    def advance(self, block: int, replaced: Mapping[str, Tensor] | None = None) -> None:
        """Make the outputs of the block the next inputs, and free the block.

        The outputs are those of the forward pass that `collect` made, or of one made now; with `replaced` (site name
        -> weight [out, in], or another parameter's name -> values) of one with these in the place of the block's own.
        """
        if replaced is not None or not self._done:
            self._load(block)
            sites = {site.name: site for site in self.layout.at(block)}
            for name, weight in (replaced or {}).items():
                own = _matrix(self._model, sites[name]) if name in sites else self._model.get_parameter(name).data
                own.copy_(weight)
            self._forward()
        self._check_order(block)
        assert self._outputs is not None
        self._inputs, self._outputs = self._outputs, self._inputs
        free_module(self._model, self.layout.blocks[block])
        self.block, self._done = block + 1, False
        give_back_memory()

    @torch.no_grad()
    def final_stats(self) -> Stats:
        """Statistics of the input of the output head, after the last block."""
        stats = Stats.empty(self._head().get_parameter("weight").shape[1], self.needs, self._device)
        for x in self._finish(stop_at_head=True):
            stats.update(x)
        return stats

    def logits(self) -> Iterator[Tensor]:
        """The model's logits [windows, seq_len, vocabulary], a few windows at a time, after the last block."""
        return self._finish(stop_at_head=False)

    @torch.no_grad()
    def first_logits(self) -> Tensor:
        """The model's logits [1, seq_len, vocabulary] of the first window, after the last block."""
        self._check_order(len(self._blocks))
        with self._loading_on_call():
            hidden = self._return(self._batch(0, 1))
            ids = self._ids[:1].to(self._device)
            logits: Tensor = self._run_model(ids, lambda *args, **kwargs: hidden, stop_at_head=False)
        return logits

    def _batches(self) -> Iterator[tuple[int, int]]:
        windows, seq_len = self._ids.shape
        step = max(1, TOKENS_PER_BATCH // seq_len)
        return ((start, min(start + step, windows)) for start in range(0, windows, step))

    def _batch(self, start: int, stop: int) -> Tensor:
        """A copy of some inputs of the current block, which may write in it."""
        return self._inputs[start:stop].to(self._device, self._dtype, copy=True)

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """Inputs of the first block, float32 [windows, seq_len, ...]; notes what each block is called with."""
        hidden: Tensor | None = None
        with self._loading_on_call():
            for number, (start, stop) in enumerate(self._batches()):
                ids = self._ids[start:stop].to(self._device)
                known = self._calls.get(stop - start)
                if known is None or number == 1:
                    first, calls = self._calls_of_all_blocks(ids)
                    if known is not None and not _equal(calls, known):
                        raise self._refusal("what its blocks are given depends on the text")
                    self._calls[stop - start] = calls
                else:
                    first = self._input_of_first_block(ids)
                if first.shape[:2] != ids.shape:
                    raise self._refusal("its hidden states are not one per token")
                if hidden is None:
                    hidden = self._new_states(first.shape[2:])
                hidden[start:stop] = first
        assert hidden is not None
        return hidden

    def _input_of_first_block(self, ids: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        self._run_model(ids, stand_in, stop_at_head=True)
        return caught[0]

    def _calls_of_all_blocks(self, ids: Tensor) -> tuple[Tensor, list[_Call]]:
        """Input of the first block, and what every block is called with.

        The blocks do nothing in this pass, so that no weight of theirs is needed: each returns what it was given. The
        way of returning it that gives every block in turn the first one's input, and nothing else that a block
        returned, is the model's.
        """
        failure: Exception | None = None
        for more in _RETURNS:
            hidden: list[Tensor] = []
            calls: list[_Call] = []
            self._more = more
            try:
                self._run_model(ids, partial(self._note, hidden, calls), stop_at_head=True)
            except ElastiqError:
                raise
            except Exception as error:  # the model's code does not expect this way of returning
                failure = error
                continue
            if len(calls) == len(self._blocks):
                return hidden[0], calls
        raise self._refusal("its blocks do not simply hand hidden states to one another") from failure

    def _note(self, first: list[Tensor], calls: list[_Call], index: int, *args: Any, **kwargs: Any) -> Any:
        """Stand-in for a block that appends its call to `calls`; stops where blocks do not form a plain chain."""
        by_keyword = "hidden_states" in kwargs
        hidden = kwargs.pop("hidden_states") if by_keyword else args[0]
        args = args if by_keyword else args[1:]
        first.append(hidden)
        extra = any(value is _FILLER for value in (*args, *kwargs.values()))
        if index != len(calls) or first[0] is not hidden or extra:
            calls.clear()
            raise _Stop
        calls.append(_Call(args, kwargs, by_keyword))
        return self._return(hidden)

    def _return(self, hidden: Tensor) -> Any:
        return hidden if self._more is None else (hidden, *self._more)

    @torch.no_grad()
    def _finish(self, stop_at_head: bool) -> Iterator[Tensor]:
        """For each batch, what follows the last block: the logits, or what enters the head."""
        self._check_order(len(self._blocks))
        with self._loading_on_call():
            for start, stop in self._batches():
                hidden = self._return(self._batch(start, stop))
                ids = self._ids[start:stop].to(self._device)
                yield self._run_model(ids, lambda *args, hidden=hidden, **kwargs: hidden, stop_at_head)

    def _run_model(self, ids: Tensor, stand_in: Callable[..., Any], stop_at_head: bool) -> Any:
        """The model's own forward pass with stand_in(index, ...) for every block.

        Returns the logits, what enters the head, or None if a stand-in stopped the pass.
        """
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])
            raise _Stop

        with ExitStack() as undo:
            for index, block in enumerate(self._blocks):
                block.forward = partial(stand_in, index)
                undo.callback(delattr, block, "forward")
            if stop_at_head:
                undo.callback(self._head().register_forward_pre_hook(catch, prepend=True).remove)
            try:
                return self._model(input_ids=ids, use_cache=False).logits
            except _Stop:
                return caught[0] if caught else None

    def _forward(self, products: Products | None = None) -> None:
        """Outputs of the current block, whose weights are loaded; `products` is told of every batch."""
        if self._outputs is None:
            self._outputs = self._new_states(self._inputs.shape[2:])
        block = self._blocks[self.block]
        generator = torch.Generator().manual_seed(self.block)
        for start, stop in self._batches():
            call = self._calls[stop - start][self.block]
            # With or without statistics the pass is the same one, to the last bit.
            with torch.set_grad_enabled(self._backward):
                output = call.run(block, self._batch(start, stop).requires_grad_(self._backward))
                if products is not None:
                    products.settle(output, generator)
            self._outputs[start:stop] = output.detach()
        self._done = True

    def _new_states(self, size: tuple[int, ...]) -> Tensor:
        """Uninitialised float32 [windows, seq_len, *size], in memory or in a file."""
        shape = (*self._ids.shape, *size)
        num_bytes = 4 * int(np.prod(shape))
        if 2 * num_bytes <= self._memory_limit:
            return torch.empty(shape)
        folder = self._spill_dir or Path(tempfile.gettempdir())
        log.info("hidden states (%d MB) are kept in a file in %s", num_bytes // 10**6, folder)
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="w+", shape=shape))
        except OSError as error:
            raise ElastiqError(
                f"no room for {num_bytes // 10**6} MB of hidden states in {folder} ({error.strerror}); "
                "free some space or use fewer calibration windows"
            ) from error

    def _load(self, block: int) -> None:
        self._check_order(block)
        load_module(self._model, self.layout.blocks[block], self._source, self._dtype, self._device)

    @contextmanager
    def _loading_on_call(self) -> Iterator[None]:
        """Modules outside the blocks get their weights when they are first called, and lose them at the end."""
        inside = {id(module) for block in self._blocks for module in block.modules()}
        called: set[str] = set()

        def load(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in called:
                called.add(name)
                load_module(self._model, name, self._source, self._dtype, self._device, recurse=False)

        handles = [
            module.register_forward_pre_hook(partial(load, name))
            for name, module in self._model.named_modules()
            if id(module) not in inside and (module._parameters or module._buffers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in called:
                free_module(self._model, name)

    def _check_order(self, block: int) -> None:
        if block != self.block:
            raise ValueError(f"the stream is at block {self.block}, not {block}")

    def _head(self) -> nn.Module:
        if self.layout.head is None:
            raise self._refusal("it has no output head")
        return self._model.get_submodule(self.layout.head)

    def _refusal(self, reason: str) -> ElastiqError:
        return ElastiqError(f"{type(self._model).__name__} cannot be calibrated block by block: {reason}")


class _Weights(Mapping[str, Tensor]):
    """Weights of a few sites, copied when looked up; those outside the blocks are read from disk each time."""

    def __init__(self, stream: BlockStream, sites: Sequence[Site]) -> None:
        self._stream = stream
        self._sites = {site.name: site for site in sites}
        self._last = "", torch.empty(0)

    def __getitem__(self, name: str) -> Tensor:
        site, stream = self._sites[name], self._stream
        if site.block != -1 and stream._dtype == torch.float32:
            return _matrix(stream._model, site).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if site.block != -1:  # what the block computes in may be coarser than what is stored
            parameter = site.tensor if site.expert is not None else f"{name}.weight"
            if self._last[0] != parameter:
                self._last = parameter, read_parameter(stream._model, parameter, stream._source).to(stream._device)
            stored = self._last[1] if site.expert is None else self._last[1][site.expert]
            return (stored.T if site.transposed else stored).clone(memory_format=torch.contiguous_format)
        load_module(stream._model, name, stream._source, torch.float32, stream._device)
        try:
            return _matrix(stream._model, site).detach()
        finally:
            free_module(stream._model, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _with(module: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, dict(parameters), args, kwargs)


def _matrix(model: PreTrainedModel, site: Site) -> Tensor:
    """View [out, in] of a loaded weight, whichever way its module stores it."""
    if site.expert is not None:
        weight = model.get_parameter(site.tensor).data[site.expert]
    else:
        weight = model.get_parameter(f"{site.name}.weight").data
    return weight.T if site.transposed else weight


def _check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if ids.dim() != 2 or not ids.numel():
        raise ElastiqError("calibration: token ids must be [windows, seq_len] with at least one window")
    if longest and 0 < longest < ids.shape[1]:  # XLNet says -1 where there is no end
        raise ElastiqError(
            f"calibration: windows of {ids.shape[1]} tokens exceed the model's {longest} positions; "
            f"use a seq_len of at most {longest}"
        )
    check_ids(model, ids, "calibration")


def _equal(a: Any, b: Any) -> bool:
    """Whether two nested arguments hold the same numbers.

    Floating-point ones to 1e-3: the cosines of rotary positions have been seen to be off by 2e-4 in a process's first
    call, when the maths library is still setting up its threads.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, rtol=0.0, atol=1e-3) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, _Call) and isinstance(b, _Call):
        return _equal((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)
