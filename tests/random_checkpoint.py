"""Checkpoints of random codes, made without any solver."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elastiq.checkpoint import CheckpointWriter
from elastiq.core import Codes, Fold, Grid, QuantizedWeight, Recipe, Site, to_half
from elastiq.formats import Integer
from elastiq.solvers import RoundToNearest

LEVELS = (2, 3, 4, 6, 8)


def random_weight(
    shape: tuple[int, int],
    levels: tuple[int, ...] = LEVELS,
    group_size: int = 32,
    symmetric: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> QuantizedWeight:
    """Random codes of `levels[-1]` bits on a random grid, values of about `scale`."""
    generator = torch.Generator().manual_seed(seed)
    bits, groups = levels[-1], -(-shape[1] // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    spread = 0.5 + torch.rand(len(levels), shape[0], groups, generator=generator)
    steps = torch.tensor([scale / 2**r for r in levels]).view(-1, 1, 1)
    middles = torch.tensor([(2.0**r - 1) / 2 for r in levels]).view(-1, 1, 1)
    noise = torch.zeros_like(spread) if symmetric else torch.randn(spread.shape, generator=generator)
    zero_point = middles + noise if symmetric else to_half(middles + noise)
    grid = Grid(levels, group_size, to_half(spread * steps), zero_point, symmetric)
    return QuantizedWeight((Codes(codes, grid),))


def row(site: Site, weight: QuantizedWeight) -> dict[str, Any]:
    """Entry of the level table."""
    (term,) = weight.terms
    assert isinstance(term, Codes)
    return {
        "name": site.name,
        "tensor": site.tensor,
        "role": site.role,
        "block": site.block,
        "shape": list(site.shape),
        "group_size": term.grid.group_size,
        "tokens": 100,
        "fallback": False,
        "levels": {str(r): {"num_bits": weight.num_bits(r), "error": 4.0**-r} for r in term.grid.levels},
    }


def random_recipe(levels: tuple[int, ...] = LEVELS, group_size: int = 32, embeddings: bool = False) -> Recipe:
    return Recipe(Integer(levels, group_size), RoundToNearest(), embeddings)


def sites_of(model: nn.Module, embeddings: bool = False) -> list[Site]:
    """Every linear layer inside the blocks, every expert, and the embedding and an untied head if asked for."""
    sites = []
    for name, module in model.named_modules():
        block = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        if isinstance(module, nn.Linear) and block >= 0:
            sites.append(Site(name, "linear", tuple(module.weight.shape), block, name))
        elif isinstance(module, Conv1D):
            sites.append(Site(name, "conv1d", tuple(module.weight.T.shape), block, name))
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.dim() == 3:
                shape = tuple(parameter.shape[1:])
                sites += [Site(f"{key}.{e}", "expert", shape, block, key, e) for e in range(len(parameter))]
    if embeddings:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): name for name, module in model.named_modules()}
        sites.append(Site(names[id(embedding)], "embedding", tuple(embedding.weight.shape), -1, ""))
        if head.weight is not embedding.weight:
            sites.append(Site(names[id(head)], "head", tuple(head.weight.shape), -1, ""))
    return sites


def base_of(model: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that are not quantized, tied ones once."""
    state = model.state_dict(keep_vars=True)
    quantized = {site.tensor if site.expert is not None else f"{site.tensor}.weight" for site in sites}
    seen = {id(state[name]) for name in quantized}
    for name, tensor in state.items():
        if name not in quantized and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def write_random(
    model: Any,
    source: Path,
    output: Path,
    *,
    levels: tuple[int, ...] = LEVELS,
    group_size: int = 32,
    symmetric: bool = False,
    embeddings: bool = False,
    fingerprint: dict[str, Any] | None = None,
    folds: Callable[[Site], tuple[Fold, ...]] = lambda site: (),
) -> dict[str, QuantizedWeight]:
    """A finished checkpoint at `output` of `model` with random codes; the weights by site name."""
    sites = sites_of(model, embeddings)
    weights = {}
    with CheckpointWriter(output, fingerprint or {"seed": 0}) as writer:
        for block in sorted({site.block for site in sites}):
            members = [site for site in sites if site.block == block]
            unit = {}
            for site in members:
                weight = random_weight(site.shape, levels, group_size, symmetric, seed=sites.index(site), scale=0.3)
                unit[site] = replace(weight, folds=folds(site))
            name = "embeddings" if block < 0 else f"block-{block:05d}"
            writer.write_unit(name, unit, [row(site, weight) for site, weight in unit.items()])
            weights |= {site.name: weight for site, weight in unit.items()}
        config = json.loads((source / "config.json").read_text())
        recipe = random_recipe(levels, group_size, embeddings)
        writer.finish(base_of(model, sites), source, config, recipe, {"command": "random"})
    return weights


SMALL = {
    "block-00000": (
        Site("model.0.up", "linear", (24, 40), 0, "a"),
        Site("model.0.down", "conv1d", (16, 50), 0, "b"),
        Site("model.0.experts.up.0", "expert", (8, 20), 0, "c", 0),
        Site("model.0.experts.up.1", "expert", (8, 20), 0, "d", 1),
        Site("model.0.experts.up.2", "expert", (8, 20), 0, "e", 2),
    ),
    "block-00001": (Site("model.1.up", "linear", (24, 40), 1, "f"),),
    "embeddings": (Site("model.embed", "embedding", (30, 24), -1, ""),),
}
"""Units of a checkpoint that belongs to no model."""


def small_unit(unit: str, levels: tuple[int, ...] = LEVELS, symmetric: bool = False) -> dict[Site, QuantizedWeight]:
    start = 10 * sorted(SMALL).index(unit)
    return {
        site: random_weight(site.shape, levels, 16, symmetric, seed=start + i) for i, site in enumerate(SMALL[unit])
    }


def small_base() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    yield "model.norm.weight", torch.randn(24, generator=generator).half()
    yield "model.0.up.bias", torch.randn(24, generator=generator).bfloat16()
    yield "model.0.gate", torch.randn(5, 3, generator=generator)
    yield "model.0.count", torch.tensor(7)
    yield "model.0.huge", torch.tensor([1e6, 3.0])


def small_source(directory: Path) -> Path:
    """A source directory with files that travel along and files that do not."""
    directory.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        (directory / name).write_text(f'{{"file": "{name}"}}')
    for name in ("modeling_own.py", "tokenizer.py", "model.safetensors", "pytorch_model.bin", "notes.txt"):
        (directory / name).write_text("stays behind")
    return directory


def fill_small(
    writer: CheckpointWriter, source: Path, levels: tuple[int, ...] = LEVELS, symmetric: bool = False
) -> None:
    """Write what is missing of the small checkpoint and finish it."""
    for unit in sorted(set(SMALL) - writer.finished()):
        weights = small_unit(unit, levels, symmetric)
        writer.write_unit(unit, weights, [row(site, weight) for site, weight in weights.items()])
    recipe = random_recipe(levels, 16, embeddings=True)
    writer.finish(small_base(), source, {"model_type": "none", "hidden_size": 24}, recipe, {"windows": 3})


def write_small(
    output: Path,
    levels: tuple[int, ...] = LEVELS,
    symmetric: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> Path:
    """A finished checkpoint of every role at `output` (returned), with no model behind it."""
    source = small_source(output.with_name(f"{output.name}-source"))
    with CheckpointWriter(output, fingerprint or {"seed": 0}) as writer:
        fill_small(writer, source, levels, symmetric)
    return output


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
