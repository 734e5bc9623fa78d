"""Where a model's stream of hidden states is begun, read and written, found by trying."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..core import Edit, ElastiqError, Heads, Norm, ResidualStream, Site
from ..parts import Hadamard
from .discover import Layout, fake_pass

_TOLERANCE = 1e-3
"""Relative difference of a norm's output that is arithmetic and not another function."""

Unchanged = Callable[[int, Mapping[str, Edit]], bool]
"""Whether block number so-and-so computes the same with some of its parameters edited."""


def residual_stream(model: PreTrainedModel, layout: Layout, unchanged: Unchanged) -> ResidualStream:
    """The stream of a model whose norms divide by the root mean square alone, so that a rotation passes through them.

    model: of `build_skeleton`. Norms are known by what they do to random numbers, readers by being given a norm's very
    output, writers by their number of outputs, values by a rotation of each head that the output projection undoes.
    Raises ElastiqError where hidden states cannot be rotated.
    """
    if layout.embedding is None or layout.head is None:
        raise refusal(model, "it has no embedding or no output head")
    if expert := next((site for site in layout.sites if site.expert is not None), None):
        raise refusal(model, f"the experts in {expert.tensor} are given the stream one at a time")
    width = model.get_parameter(f"{layout.embedding}.weight").shape[-1]
    readers_of = _readers(model, {layout.head, *(site.name for site in layout.sites)}, layout.head)
    last = next((name for name, readers in readers_of.items() if layout.head in readers), None)
    if last is None:
        raise refusal(model, "no norm stands before its output head")
    norms: list[Norm] = []
    writers: list[str] = []
    heads: list[Heads] = []
    known: dict[tuple[str, ...], tuple[str, str, int] | None] = {}
    for index, block in enumerate(layout.blocks):
        own = layout.at(index)
        read = {n: readers for n, readers in readers_of.items() if n.startswith(f"{block}.")}
        norms += [_norm(model, name, readers, width) for name, readers in read.items()]
        inner = {name for readers in read.values() for name in readers}
        written = [site for site in own if site.name not in inner and site.shape[0] == width]
        writers += [site.name for site in written]
        kind = tuple(site.name.removeprefix(block) for site in own)
        if kind not in known:
            known[kind] = _heads(model, block, [s for s in own if s.name in inner], written, partial(unchanged, index))
        if (found := known[kind]) is not None:
            heads.append(Heads(f"{block}{found[0]}.weight", f"{block}{found[1]}.weight", found[2]))
    norms.append(_norm(model, last, (layout.head,), width))
    return ResidualStream(
        width=width,
        embedding=f"{layout.embedding}.weight",
        norms=tuple(norms),
        writers=tuple(f"{name}.{key}" for name in writers for key in ("weight", "bias")),
        heads=tuple(heads),
        transposed=frozenset(f"{site.name}.weight" for site in layout.sites if site.role == "conv1d"),
    )


def refusal(model: nn.Module, reason: str) -> ElastiqError:
    """The sentence for a model whose hidden states cannot be rotated."""
    return ElastiqError(
        f"{type(model).__name__}: its residual stream cannot be rotated, because {reason}; "
        "rotate what every matrix is given instead (--rotate)"
    )


def _readers(model: PreTrainedModel, names: set[str], head: str) -> dict[str, tuple[str, ...]]:
    """Norm -> those of `names` that are given its very output, in the order of the calls; seen with fake tensors."""
    readers: dict[str, list[str]] = defaultdict(list)
    made: list[tuple[Tensor, str]] = []

    def note_output(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((output, name))

    def note_input(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        maker = next((maker for output, maker in reversed(made) if args and output is args[0]), None)
        if maker is None and name == head:  # which is given some of the rows that the last norm made
            maker = next((maker for _, maker in reversed(made) if _is_norm(model.get_submodule(maker))), None)
        if maker is not None:
            readers[maker].append(name)

    def watch(twin: nn.Module) -> None:
        for name, module in twin.named_modules():
            if name in names:
                module.register_forward_pre_hook(partial(note_input, name))
            elif name and not list(module.children()):
                module.register_forward_hook(partial(note_output, name))

    fake_pass(model, watch)
    return {name: tuple(found) for name, found in readers.items() if _is_norm(model.get_submodule(name))}


def _is_norm(module: nn.Module) -> bool:
    """Whether it makes rows of one size out of rows of any size: a gate or an activation does not."""
    return "norm" in type(module).__name__.lower()


def _norm(model: PreTrainedModel, name: str, readers: Sequence[str], width: int) -> Norm:
    module = model.get_submodule(name)
    gains = dict(module.named_parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator) + 0.5  # a mean that centring would take away

    def run(gain: float, x: Tensor) -> Tensor:
        values = {key: torch.full(p.shape, gain if key == "weight" else 0.0) for key, p in gains.items()}
        found: Tensor = functional_call(copy.deepcopy(module), values, (x,))
        return found

    offset = next((o for o in (0.0, 1.0) if not gains or not run(-o, x).any()), None)
    if set(gains) - {"weight"} or offset is None:
        raise refusal(model, f"{name} is a norm with more than a gain")
    turn = Hadamard.of(torch.rand(width, generator=generator) < 0.5)
    expected, got = turn.forward(run(1 - offset, x)), run(1 - offset, turn.forward(x))
    if float((got - expected).norm()) > _TOLERANCE * float(expected.norm()):
        raise refusal(model, f"{name} ({type(module).__name__}) does more than divide by the root mean square")
    return Norm(f"{name}.weight" if gains else None, offset, tuple(f"{reader}.weight" for reader in readers))


def _heads(
    model: PreTrainedModel,
    block: str,
    readers: Sequence[Site],
    writers: Sequence[Site],
    unchanged: Callable[[Mapping[str, Edit]], bool],
) -> tuple[str, str, int] | None:
    """Values and output of a block's attention, as the rest of their names, and the channels per head; None where no
    pair of matrices keeps the block's function when every head of one is rotated and the other undoes it."""
    config = model.config.get_text_config()
    count = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // count if count else None)
    if not size or size < 2:
        return None
    turn = Hadamard.of(torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.5)
    for output in writers:
        for values in readers:
            if output.shape[1] % size or values.shape[0] % size or output.shape[1] % values.shape[0]:
                continue
            edits = {
                f"{values.name}.weight": Edit(outputs=turn, transposed=values.role == "conv1d"),
                f"{values.name}.bias": Edit(outputs=turn),
                f"{output.name}.weight": Edit(inputs=turn, transposed=output.role == "conv1d"),
            }
            if unchanged(edits):
                return values.name.removeprefix(block), output.name.removeprefix(block), size
    return None
