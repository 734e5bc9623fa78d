"""The second phase of a run: finished levels tuned one after another against the full model's answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..checkpoint import CheckpointWriter
from ..checkpoint.tensors import tensor_bytes, write_tensors
from ..core import Codes, Edits, ElastiqError, QuantizedWeight, SideTerm, Site, Tuner
from ..models import Layout, ModelSource, build_skeleton, free_parameter, load_module
from ..tuners.training import Weights
from .objective import by_parameter, parameter

Progress = Callable[[str, int, int], None]

KEPT_ANSWERS = 256
"""Most probable tokens whose probabilities are kept for each position; the others count together."""
ANSWER_BYTES = 6 * KEPT_ANSWERS
"""On disk for each position: tokens and the half-precision logarithms of their probabilities."""
_COARSE = 4
"""Bits of the widest level that loses more than the arithmetic of bfloat16."""
_LOGITS_BYTES = 2**28
"""float32 logits of one batch of the full model."""
_CHUNK = 2**21
"""Logits of the loss worked on at a time."""


def tune(
    writer: CheckpointWriter,
    source: ModelSource,
    edits: Edits,
    layout: Layout,
    sites: Sequence[Site],
    levels: Sequence[int],
    tuner: Tuner,
    ids: Tensor,
    wanted: torch.dtype | None,
    device: torch.device | str,
    report: Progress,
) -> dict[int, dict[str, Any]]:
    """Tune every level whose result is not durable yet; the loss before and after of each.

    edits: as for `build_skeleton`. ids: int64 [windows, seq_len]. wanted: as in `arithmetic`; what is not a matrix of
    `sites` stays in float32. Memory: the matrices once in the arithmetic's type, codes, the answers, and the
    activations of one batch.
    """
    todo = [group for group in tuner.groups(levels) if not set(group) <= writer.tuned().keys()]
    if todo:
        model = build_skeleton(source, torch.float32, edits)
        answers = writer.side_file("answers")
        exact = arithmetic(device, wanted, [level for group in tuner.groups(levels) for level in group])
        _load(model, source, sites, exact, device)
        if not answers.is_file():
            writer.write_side_file("answers", lambda path: _write_answers(path, model, ids, exact, device, report))
        for name in by_parameter(sites):
            free_parameter(model, name)
        weights = _weights(writer, model, device)
        for group in todo:
            calls = tuner.calls(len(ids), group)
            called = partial(_report_call, report, group, calls)
            kept = layout.blocks if tuner.joint else ()
            dtype = arithmetic(device, wanted, group)
            objective = TextObjective(model, sites, ids, answers, dtype, device, called, kept)
            tuned = tuner.tune(objective, weights, group, FileJournal(writer, f"state-{group[0]}-{group[-1]}"))
            by_site = {site: tuned.weights[site.name] for site in sites}
            facts = {level: {"before": tuned.before[level], "after": tuned.after[level]} for level in group}
            writer.write_tuned(facts, by_site, codes=tuner.joint)
            called(calls)
    return writer.tuned()


def estimate(
    model: PreTrainedModel, sites: Sequence[Site], levels: Sequence[int], tuner: Tuner, seq_len: int
) -> tuple[int, dict[torch.dtype, float]]:
    """Bytes of memory, and multiplications and additions of each type, that `tune` takes on a processor, roughly;
    `model` may be on meta."""
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    matrices = sum(site.num_weights for site in sites)
    groups, batch = tuner.groups(levels), seq_len * tuner.batch
    exact = arithmetic("cpu", None, [level for group in groups for level in group])
    flops = defaultdict(float, {exact: 2.0 * total * seq_len * tuner.windows})
    for group in groups:
        tokens = (4 if tuner.joint else 3) * batch * tuner.calls(tuner.windows, group)
        flops[arithmetic("cpu", None, group)] += 2.0 * total * tokens
    width = model.config.get_text_config().vocab_size + sum(sum(site.shape) for site in sites)
    size = exact.itemsize
    return matrices * (2 * size + 1) + 8 * (total - matrices) + 2 * size * batch * width, flops


def _report_call(report: Progress, levels: Sequence[int], calls: int, done: int) -> None:
    report(f"tuning {', '.join(map(str, levels))} bits", done, calls)


def arithmetic(device: torch.device | str, wanted: torch.dtype | None, levels: Sequence[int]) -> torch.dtype:
    """What tuning `levels` computes in: `wanted`, else bfloat16 where the device multiplies it natively, else float32.
    Always float32 where a level has more than 4 bits, which lose less than bfloat16 does."""
    if wanted is not None:
        return wanted
    if max(levels, default=0) > _COARSE:
        return torch.float32
    kind = torch.device(device).type
    native = torch.cpu._is_avx512_bf16_supported() if kind == "cpu" else kind == "cuda"
    return torch.bfloat16 if native else torch.float32


class TextObjective:
    """Divergence of the model's next-token probabilities from the full model's, on windows of text.

    model: everything but the matrices of `sites` loaded. answers: file that `_write_answers` made for `ids`.
    called: told before each loss how many were computed. recomputed: names of the blocks whose activations and matrices
    are not kept for the backward pass but computed again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        ids: Tensor,
        answers: Path,
        dtype: torch.dtype,
        device: torch.device | str,
        called: Callable[[int], None],
        recomputed: Sequence[str] = (),
    ) -> None:
        self._model, self._ids, self._dtype, self._device = model, ids, dtype, torch.device(device)
        self._parameters = by_parameter(sites)
        self._answers = safe_open(answers, framework="pt")
        self._calls, self._called = 0, called
        self._recomputed = recomputed

    def __len__(self) -> int:
        return len(self._ids)

    def loss(
        self, weight: Weights, windows: Sequence[int], second: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Mean over all positions of these windows; see `Objective`."""
        self._called(self._calls)
        self._calls += 1
        logits = self._logits(weight, windows)
        kept = [
            torch.stack([self._answers.get_slice(name)[window] for window in windows]).to(self._device).flatten(0, 1)
            for name in ("tokens", "log_probabilities")
        ]
        compared = [kept] if second is None else [kept, second]
        return torch.stack([Divergence.apply(logits, tokens.long(), p.float()) for tokens, p in compared]).mean()

    @torch.no_grad()
    def answers(self, weight: Weights, windows: Sequence[int]) -> tuple[Tensor, ...]:
        """Most probable tokens and their log probabilities, [positions, known]."""
        return most_probable(self._logits(weight, windows))

    def original(self, name: str) -> None:
        """Freed once the full model has answered."""

    def _logits(self, weight: Weights, windows: Sequence[int]) -> Tensor:
        """[positions, vocabulary] of the model with these matrices."""
        arguments = {"input_ids": self._ids[list(windows)].to(self._device), "use_cache": False}
        parameters = dict(self._parameters)
        with ExitStack() as undo:
            for name in self._recomputed:
                block = self._model.get_submodule(name)
                inside = {key: parameters.pop(key) for key in list(parameters) if key.startswith(f"{name}.")}
                own = {key.removeprefix(f"{name}."): members for key, members in inside.items()}
                block.forward = partial(self._run_block, block, own, weight)
                undo.callback(delattr, block, "forward")
            undo.enter_context(torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32))
            outside = {key: parameter(sites, weight, self._device, self._dtype) for key, sites in parameters.items()}
            logits: Tensor = functional_call(self._model, outside, (), arguments).logits
        return logits.flatten(0, 1)

    def _run_block(
        self, block: nn.Module, own: Mapping[str, list[Site]], weight: Weights, *args: Any, **kwargs: Any
    ) -> Any:
        """A block's forward pass that keeps its inputs alone for the backward pass."""

        def run(*args: Any, **kwargs: Any) -> Any:
            parameters = {name: parameter(members, weight, self._device, self._dtype) for name, members in own.items()}
            ours = block.__dict__.pop("forward", None)  # gone by the time of the backward pass
            try:
                return functional_call(block, parameters, args, kwargs)
            finally:
                if ours is not None:
                    block.forward = ours

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class FileJournal:
    """A `Journal` in a file of the run called `name`."""

    def __init__(self, writer: CheckpointWriter, name: str) -> None:
        self._writer, self._name = writer, name

    def load(self) -> dict[str, Tensor]:
        path = self._writer.side_file(self._name)
        return load_file(path) if path.is_file() else {}

    def save(self, state: Mapping[str, Tensor]) -> None:
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        self._writer.write_side_file(
            self._name, lambda path: write_tensors(path, specs, lambda name: [tensor_bytes(state[name])])
        )


class Forgetful:
    """A `Journal` for work too short to be kept."""

    def load(self) -> dict[str, Tensor]:
        return {}

    def save(self, state: Mapping[str, Tensor]) -> None:
        pass


class Divergence(torch.autograd.Function):
    """Mean KL(p || q) in nats of q = softmax(logits) from p, of which the most probable tokens are known.

    All other tokens count as one: KL of the distributions over the known tokens and "something else", a lower bound.
    The gradient is computed on the way, a few rows at a time: q - p where p is known, and q (1 - p_rest / q_rest)
    elsewhere. Nothing of the size of the logits is held but itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_p: Tensor) -> Tensor:
        """Scalar of logits [rows, vocabulary], tokens int64 and log_p float32 [rows, known]."""
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64)
        size = max(1, _CHUNK // logits.shape[1])
        for first in range(0, len(logits), size):
            rows = slice(first, first + size)
            q = logits[rows].float().softmax(-1)
            p, known = log_p[rows].exp(), q.gather(1, tokens[rows])
            p_rest, q_rest = ((1 - x.sum(1, keepdim=True)).clamp_min(1e-6) for x in (p, known))
            terms = p * (log_p[rows] - known.clamp_min(1e-30).log())
            total += (terms.sum(1, keepdim=True) + p_rest * (p_rest / q_rest).log()).sum(dtype=torch.float64).cpu()
            if gradient is not None:
                q.mul_(1 - p_rest / q_rest).scatter_(1, tokens[rows], known - p)
                gradient[rows] = q.div_(len(logits))
        ctx.gradient = gradient
        return (total / len(logits)).float().to(logits.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grads[0], None, None


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log probabilities [..., known] of the most probable answers, in no order."""
    logits = logits.float()
    best, index = logits.topk(min(KEPT_ANSWERS, logits.shape[-1]), sorted=False)
    return index, best - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def _write_answers(
    path: Path, model: PreTrainedModel, ids: Tensor, dtype: torch.dtype, device: torch.device | str, report: Progress
) -> None:
    """The full model's most probable tokens at every position, and their log probabilities."""
    tokens: list[Tensor] = []
    log_p: list[Tensor] = []
    vocabulary = model.config.get_text_config().vocab_size
    batch = max(1, _LOGITS_BYTES // (4 * ids.shape[1] * vocabulary))
    for first in range(0, len(ids), batch):
        report("reading the full model's answers", first, len(ids))
        part = ids[first : first + batch].to(device)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=part, use_cache=False).logits.float()
        index, best = most_probable(logits)
        log_p.append(best.half().cpu())
        tokens.append(index.int().cpu())
    report("reading the full model's answers", len(ids), len(ids))
    if not all(bool(torch.isfinite(part).all()) for part in log_p):
        raise ElastiqError(f"the full model's answers are not finite in {dtype}; tune with --dtype float32")
    shape = (*ids.shape, tokens[0].shape[-1])
    parts = {"tokens": tokens, "log_probabilities": log_p}
    specs = {"tokens": (torch.int32, shape), "log_probabilities": (torch.float16, shape)}
    write_tensors(path, specs, lambda name: (tensor_bytes(part) for part in parts[name]))


def _load(
    model: PreTrainedModel, source: ModelSource, sites: Sequence[Site], dtype: torch.dtype, device: torch.device | str
) -> None:
    """The whole model: what holds a matrix of `sites` in `dtype`, everything else in float32."""
    owners = {name.rpartition(".")[0] for name in by_parameter(sites)}
    for name, _ in model.named_modules():
        load_module(model, name, source, dtype if name in owners else torch.float32, device, recurse=False)


@torch.no_grad()
def _weights(
    writer: CheckpointWriter, model: PreTrainedModel, device: torch.device | str
) -> dict[str, QuantizedWeight]:
    """Every finished matrix by site name; `model` gets what is to stand beside them."""
    found: dict[str, QuantizedWeight] = {}
    for unit in sorted(writer.finished()):
        found |= {name: _moved(weight, device) for name, weight in writer.read_unit(unit).items()}
        for name, values in writer.read_beside(unit).items():
            model.get_parameter(name).copy_(values)
    return found


def _moved(weight: QuantizedWeight, device: torch.device | str) -> QuantizedWeight:
    """The matrix with its arrays on `device`."""
    codes, *sides = weight.terms
    assert isinstance(codes, Codes) and all(isinstance(side, SideTerm) for side in sides)
    grid = replace(codes.grid, scale=codes.grid.scale.to(device), zero_point=codes.grid.zero_point.to(device))
    terms = (Codes(codes.codes.to(device), grid), *(side.to(device) for side in cast(list[SideTerm], sides)))
    powers = None if weight.powers is None else weight.powers.to(device)
    return QuantizedWeight(terms, tuple(fold.to(device) for fold in weight.folds), powers)
