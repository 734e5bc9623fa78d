"""Gather what sensitivities ask for, in as few passes as there are kinds of question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..core import ElastiqError, Evidence, Stats
from .bench import Bench, block_name
from .prefix import predictions

Progress = Callable[[str, int, int], None]

_PROBES = 4
"""Random directions per window of Hutchinson's estimate."""
_PASSES = 4
"""Power iterations over the stream of gradients."""
_DRAWS = 64
"""Backward passes for drawn labels, over all windows: the standard error of a loss is a sixth."""
_BLOCK_TOKENS = 1024
"""Tokens kept at both ends of every block."""


def gather(
    bench: Bench, known: Mapping[str, Evidence], blocks: Mapping[str, int], needs: frozenset[str], progress: Progress
) -> dict[str, Evidence]:
    """`known` with the fields that `needs` names. blocks: index of the decoder block of a matrix, -1 outside of them.

    Raises ElastiqError where a gradient is asked of a quantized embedding.
    """
    found = dict(known)
    if "weight" in needs:
        for name, evidence in found.items():
            found[name] = replace(
                evidence, weight=_rows(bench.decode(name, evidence.levels[-1])), quantized=partial(_read, bench, name)
            )
    if needs & {"stats", "blocks"}:
        _watch(bench, found, blocks, needs, progress)
    if needs & {"gradient", "fisher"}:
        _first_order(bench, found, needs, progress)
    if "eigenvalue" in needs:
        _eigenvalues(bench, found, progress)
    if "trace" in needs:
        _traces(bench, found, progress)
    if "slopes" in needs:
        _draws(bench, found, progress)
    return found


def _rows(weight: Tensor) -> Tensor:
    return weight.flatten(0, -2)


def _read(bench: Bench, name: str, level: int) -> Tensor:
    return _rows(bench.decode(name, level))


@torch.no_grad()
def _watch(
    bench: Bench, found: dict[str, Evidence], blocks: Mapping[str, int], needs: frozenset[str], progress: Progress
) -> None:
    """Input statistics of every linear layer, hidden states around every block: one pass."""
    stats = {name: Stats() for name in found}
    ends: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    share = max(1, -(-bench.ids.numel() // _BLOCK_TOKENS))

    def see_input(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        stats[name].update(args[0])

    def see_block(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        for kept, states in zip(ends[name], (hidden, out), strict=True):
            kept.append(states.flatten(0, -2)[::share].float())

    with bench.widest() as model, ExitStack() as hooks:
        for name in found:
            parameter = bench.parameter(name)
            if "stats" in needs and parameter is not None and parameter.dim() == 2:
                stats[name] = Stats.empty(parameter.shape[1], frozenset({"diagonal", "abs_max"}), parameter.device)
                hook = model.get_submodule(name).register_forward_pre_hook(partial(see_input, name))
                hooks.callback(hook.remove)
        if "blocks" in needs:
            names = {block_name(name, block) for name, block in blocks.items()} - {None}
            for name in sorted(map(str, names)):
                ends[name] = ([], [])
                module = model.get_submodule(name)
                hooks.callback(
                    module.register_forward_hook(partial(see_block, name), with_kwargs=True).remove
                )
        for index, ids in enumerate(bench.ids):
            progress("watching activations", index, len(bench.ids))
            model(input_ids=ids[None], use_cache=False)
    for name, evidence in found.items():
        block = block_name(name, blocks[name])
        first, last = (None, None) if block not in ends else (torch.cat(part) for part in ends[block])
        found[name] = replace(
            evidence, stats=stats[name] if "stats" in needs else None, block_input=first, block_output=last
        )


def _parameters(bench: Bench, names: Mapping[str, Evidence]) -> dict[str, nn.Parameter]:
    parameters = {}
    for name in names:
        parameter = bench.parameter(name)
        if parameter is None:
            raise ElastiqError(f"{name}: gradients of a quantized embedding are not measured; use --method kl")
        parameters[name] = parameter
    return parameters


def _loss(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    return F.cross_entropy(predictions(model, ids, first), ids[first:])


@contextmanager
def _differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def _gradients(bench: Bench, parameters: Mapping[str, nn.Parameter], ids: Tensor, again: bool = False) -> list[Tensor]:
    """Gradients of one window's mean loss; with `again`, within `_differentiable`, they can be differentiated again."""
    with bench.widest() as model, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        if not again:
            stack.enter_context(_differentiable(parameters))
        return list(torch.autograd.grad(_loss(model, ids, bench.first), list(parameters.values()), create_graph=again))


def _first_order(bench: Bench, found: dict[str, Evidence], needs: frozenset[str], progress: Progress) -> None:
    parameters = _parameters(bench, found)
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()} if "gradient" in needs else {}
    square = {name: torch.zeros_like(p) for name, p in parameters.items()} if "fisher" in needs else {}
    for index, ids in enumerate(bench.ids):
        progress("gradients", index, len(bench.ids))
        for name, gradient in zip(parameters, _gradients(bench, parameters, ids), strict=True):
            if mean:
                mean[name] += gradient / len(bench.ids)
            if square:
                square[name] += gradient.square() / len(bench.ids)
    for name, evidence in found.items():
        found[name] = replace(
            evidence,
            gradient=_rows(mean[name].detach()) if mean else None,
            fisher=_rows(square[name].detach()) if square else None,
        )


def _draws(bench: Bench, found: dict[str, Evidence], progress: Progress) -> None:
    """Gradients for labels drawn from the model's predictions, whose mean is zero and whose covariance is Fisher's
    information; changes of the weights are kept in bfloat16 meanwhile, two bytes a weight and level."""
    parameters = _parameters(bench, found)
    changes = {
        name: {level: evidence.change(level).bfloat16() for level in evidence.levels[:-1]}
        for name, evidence in found.items()
    }
    drawn = {name: torch.zeros_like(p) for name, p in parameters.items()}
    slopes: dict[str, dict[int, list[Tensor]]] = {
        name: {level: [] for level in evidence.levels} for name, evidence in found.items()
    }
    generator = torch.Generator(bench.ids.device).manual_seed(0)
    tokens, draws = bench.ids.shape[1] - bench.first, -(-_DRAWS // len(bench.ids))
    total = draws * len(bench.ids)
    with bench.widest() as model, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _differentiable(parameters):
        for index, ids in enumerate(bench.ids):
            logits = predictions(model, ids, bench.first)
            probabilities = logits.detach().softmax(-1)
            for draw in range(draws):
                progress("drawing labels", index * draws + draw, total)
                labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, labels, reduction="sum")
                gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=draw + 1 < draws)
                for name, gradient in zip(parameters, gradients, strict=True):
                    drawn[name].addcmul_(gradient, gradient, value=1 / (total * tokens))
                    for level in found[name].levels:
                        change = changes[name].get(level)
                        slope = gradient.new_zeros(()) if change is None else (_rows(gradient) * change).sum()
                        slopes[name][level].append(slope / tokens**0.5)
    for name, evidence in found.items():
        measured = {level: torch.stack(values) for level, values in slopes[name].items()}
        found[name] = replace(evidence, slopes=measured, drawn=_rows(drawn[name]))


def _eigenvalues(bench: Bench, found: dict[str, Evidence], progress: Progress) -> None:
    """Power iteration: v becomes the mean of g (gᵀ v) over the windows; what it grows by tends to the eigenvalue."""
    parameters = _parameters(bench, found)
    generator = torch.Generator().manual_seed(0)
    vectors = {name: _unit(torch.randn(p.shape, generator=generator).to(p)) for name, p in parameters.items()}
    values = dict.fromkeys(parameters, 0.0)
    for turn in range(_PASSES):
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for index, ids in enumerate(bench.ids):
            progress("power iteration", turn * len(bench.ids) + index, _PASSES * len(bench.ids))
            for name, gradient in zip(parameters, _gradients(bench, parameters, ids), strict=True):
                sums[name] += gradient * (gradient * vectors[name]).sum() / len(bench.ids)
        for name, total in sums.items():
            values[name] = float(total.norm())
            vectors[name] = _unit(total.detach())
    for name, evidence in found.items():
        found[name] = replace(evidence, eigenvalue=values[name])


def _unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-30)


def _traces(bench: Bench, found: dict[str, Evidence], progress: Progress) -> None:
    """Hutchinson: the mean of v (H v) over random signs v, all matrices at once; between matrices the mean is zero."""
    parameters = _parameters(bench, found)
    generator = torch.Generator().manual_seed(0)
    traces = dict.fromkeys(parameters, 0.0)
    total = len(bench.ids) * _PROBES
    with _differentiable(parameters):
        for index, ids in enumerate(bench.ids):
            gradients = _gradients(bench, parameters, ids, again=True)
            for probe in range(_PROBES):
                progress("Hessian-vector products", index * _PROBES + probe, total)
                signs = [torch.randint(0, 2, g.shape, generator=generator).to(g) * 2 - 1 for g in gradients]
                along = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
                products = torch.autograd.grad(along, list(parameters.values()), retain_graph=probe + 1 < _PROBES)
                for name, sign, product in zip(parameters, signs, products, strict=True):
                    traces[name] += float((sign * product).sum()) / total
    for name, evidence in found.items():
        found[name] = replace(evidence, trace=traces[name])
