"""Which matrices of a model can be quantized."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..core import TRANSPOSED, ElastiqError, Site

log = logging.getLogger("elastiq")


@dataclass(frozen=True)
class Layout:
    """What a model is made of, as seen by a quantizer.

    blocks: names of the decoder blocks in order. sites: the matrices inside the blocks, in the order of the module
    tree; sites of one block that are given the very same tensor have one input_id, the name of the first of them.
    skipped: matrix -> why it keeps its 16 bits. embedding, head: names of the input embedding and the output head,
    None where there is none. outer: their sites (block -1); one site, the embedding's, where they are tied.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    skipped: dict[str, str]
    embedding: str | None
    head: str | None
    tied: bool
    outer: tuple[Site, ...]

    def at(self, block: int) -> tuple[Site, ...]:
        """Sites of one block; of the embedding and the head for -1."""
        return self.outer if block == -1 else tuple(site for site in self.sites if site.block == block)


def discover(model: PreTrainedModel) -> Layout:
    """Blocks and matrices of a causal language model, found without any knowledge of its family.

    The blocks are the outermost list of modules that holds the most weights. In them, every nn.Linear, GPT-2's Conv1D
    and every expert of a fused 3-D parameter is a matrix; routers and gates are not quantized. Raises ElastiqError
    naming the architecture and the reason if the model cannot be handled.
    """
    blocks = _blocks(model)
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for index, block in enumerate(blocks):
        _scan_block(model, block, index, sites, skipped)
    sites = _traced(model, blocks, sites, skipped)
    if not sites:
        raise _refusal(model, f"its blocks ({blocks[0]}, ...) hold no linear layer")
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    outer = _outer(model, embedding, head)
    kept_apart = tuple(f"{name}." for name in (*blocks, *(site.name for site in outer)))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith(kept_apart):
            skipped[name.removesuffix(".weight")] = "outside the decoder blocks"
    return Layout(
        blocks=blocks,
        sites=tuple(sites),
        skipped=skipped,
        embedding=embedding,
        head=head,
        tied=len(outer) == 1 and head is not None,
        outer=outer,
    )


def _refusal(model: PreTrainedModel, reason: str) -> ElastiqError:
    return ElastiqError(f"{type(model).__name__} cannot be quantized: {reason}")


def _blocks(model: PreTrainedModel) -> tuple[str, ...]:
    decoder = model.get_decoder()
    lists = _outer_lists(decoder, _name_of(model, decoder) or "") or _outer_lists(model, "")
    if not lists:
        raise _refusal(model, "it has no list of decoder blocks")
    name, module = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if len({id(block) for block in module}) < len(module):
        raise _refusal(model, f"{name} uses one block several times")
    return tuple(f"{name}.{index}" for index in range(len(module)))


def _outer_lists(module: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """Lists of modules that are in no other list, by name."""
    lists: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules(prefix=prefix):
        if isinstance(part, nn.ModuleList) and len(part) and not name.startswith(tuple(f"{n}." for n in lists)):
            lists[name] = part
    return lists


def _scan_block(model: PreTrainedModel, block: str, index: int, sites: list[Site], skipped: dict[str, str]) -> None:
    """Append the matrices of one block to `sites`, what is left out to `skipped`."""
    num_experts, router_prefixes = _experts(model, block)
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        if isinstance(module, nn.Linear | Conv1D):
            shape = _matrix_shape(module)
            reason = _keep(module, shape)
            if shape[0] == num_experts and name.startswith(router_prefixes):
                reason = f"router to {num_experts} experts"
            if reason:
                skipped[name] = reason
            else:
                role = "linear" if isinstance(module, nn.Linear) else "conv1d"
                sites.append(Site(name, role, shape, index, name))
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.dim() < 2:
                continue
            if _is_fused(module, parameter):
                role = _fused_role(model, module, key)
                experts, *matrix = parameter.shape
                names = [f"{key}.{expert}" for expert in range(experts)]
                shape = (matrix[1], matrix[0]) if role in TRANSPOSED else (matrix[0], matrix[1])
                sites.extend(Site(n, role, shape, index, n, e) for e, n in enumerate(names))
            elif parameter.shape[0] == num_experts and not key.endswith("bias"):
                skipped[key.removesuffix(".weight")] = f"router to {num_experts} experts"
            else:
                skipped[key.removesuffix(".weight")] = f"a parameter of {type(module).__name__}, not of a linear layer"


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features)."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _keep(module: nn.Module, shape: tuple[int, int]) -> str | None:
    if type(module) not in (nn.Linear, Conv1D) and not _multiplies(module):
        return f"{type(module).__name__} computes in a way of its own"
    return "a gate with one output" if shape[0] == 1 else None


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear layer of a class of its own gives x Wᵀ + b (Falcon's does), tried on a small random matrix."""
    weight, x, bias = torch.randn(5, 3), torch.randn(2, 4, 3), torch.randn(5)
    parameters = {"weight": weight} | ({} if module.bias is None else {"bias": bias})
    wanted = x @ weight.T + (0 if module.bias is None else bias)
    try:
        with torch.no_grad():
            found = functional_call(module, parameters, (x,))
    except Exception as error:
        log.debug("%s: cannot be called with a small matrix: %s", type(module).__name__, error)
        return False
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4)


def _experts(model: PreTrainedModel, block: str) -> tuple[int, tuple[str, ...]]:
    """Number of experts in a block (-1: none) and the prefixes of the modules that route to them."""
    count, prefixes = -1, []
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        fused = next((p for p in module.parameters(recurse=False) if _is_fused(module, p)), None)
        if fused is not None:
            count = fused.shape[0]
        elif isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]:
            count = len(module)
        else:
            continue
        prefixes.append(name.rpartition(".")[0] + ".")
    return count, tuple(prefixes)


def _is_fused(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter stacks the matrices of several experts."""
    return parameter.dim() == 3 and "expert" in type(module).__name__.lower()


def _fused_role(model: PreTrainedModel, module: nn.Module, name: str) -> str:
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        raise _refusal(model, f"{type(module).__name__} does not multiply by the experts in {name} one at a time")
    return "expert_transposed" if transposed else "expert"


def _outer(model: PreTrainedModel, embedding: str | None, head: str | None) -> tuple[Site, ...]:
    tables: list[tuple[str, str]] = []
    if embedding is not None:
        tables.append((embedding, "embedding"))
    if head is not None and (embedding is None or _weight(model, head) is not _weight(model, embedding)):
        tables.append((head, "head"))
    return tuple(Site(name, role, _matrix_shape(model.get_submodule(name)), -1, name) for name, role in tables)


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _traced(model: PreTrainedModel, blocks: tuple[str, ...], sites: list[Site], skipped: dict[str, str]) -> list[Site]:
    """The sites with input_id set to the first site that is given the same tensor; those never called are skipped."""
    leader, finished = _trace(model, blocks, {site.name for site in sites if site.expert is None})
    kept = []
    for site in sites:
        if site.expert is None and site.name not in leader and site.block in finished:
            skipped[site.name] = "its weight is used without calling its layer"
        else:
            kept.append(replace(site, input_id=leader.get(site.name, site.name)))
    return kept


def _trace(model: PreTrainedModel, blocks: tuple[str, ...], names: set[str]) -> tuple[dict[str, str], set[int]]:
    """(site -> first site with the same input, blocks that ran to their end), seen in one pass with fake tensors.

    Nothing is computed or allocated. Where a block cannot run without numbers, what was seen until then counts and
    the rest of its sites keep to themselves: that costs statistics, not correctness.
    """
    leader: dict[str, str] = {}
    finished: set[int] = set()
    seen: list[tuple[Tensor, int, str]] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x, version = args[0], args[0]._version  # the version counts writes in place
        leader[name] = next((other for y, v, other in seen if y is x and v == version), name)
        seen.append((x, version, name))

    def guarded(index: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.clear()
        try:
            result = forward(*args, **kwargs)
        except Exception as error:
            log.debug("shared inputs: a block needs numbers: %s", error)
            return hidden
        finished.add(index)
        return result

    def watch(twin: nn.Module) -> None:
        for name, module in twin.named_modules():
            if name in names:
                module.register_forward_pre_hook(partial(note, name))
            if name in blocks:
                module.forward = partial(guarded, blocks.index(name), module.forward)
            if any(_is_fused(module, p) for p in module.parameters(recurse=False)):
                module.forward = lambda hidden, *args, **kwargs: hidden

    fake_pass(model, watch)
    return leader, finished


def fake_pass(model: PreTrainedModel, watch: Callable[[nn.Module], None]) -> None:
    """One pass of a twin of `model` over fake tokens, as far as it gets; watch(twin) puts hooks into it first."""
    twin = copy.deepcopy(model)
    watch(twin)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for module in twin.modules():
                for tensors in (module._parameters, module._buffers):
                    _make_fake(tensors)
            twin(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    except Exception as error:
        log.debug("shared inputs: the model needs numbers: %s", error)


def _make_fake(tensors: dict[str, Any]) -> None:
    """Under FakeTensorMode: replace tensors by ones of that shape and kind that pretend to be on the CPU."""
    for key, tensor in tensors.items():
        if tensor is not None:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensors[key] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
