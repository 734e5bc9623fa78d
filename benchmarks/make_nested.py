"""Round a model to nearest into a nested checkpoint within minutes, for measurements of time and memory.

    python benchmarks/make_nested.py MODEL OUT [--group-size 128]

Min-max ranges at 8 bits, no calibration and no search; narrower levels truncate the codes on scales that keep their
cells centred. Embedding and output head are quantized too. Bytes and speed are those of any other recipe of the same
levels and group size; the quality at few bits is poor, and nothing about methods can be read from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import elastiq
from elastiq.checkpoint import CheckpointWriter
from elastiq.core import MAX_BITS, MIN_SCALE, Codes, Grid, QuantizedWeight, Site, derive, to_half
from elastiq.models import Layout, ModelSource, build_skeleton, discover

LEVELS = (2, 3, 4, 6, 8)


def round_matrix(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Codes of `weight` [out, in] on the grid from each group's smallest to its largest value."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group_size)).unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = to_half(((high - low) / (2**MAX_BITS - 1)).clamp_min(MIN_SCALE))
    zero_point = to_half(-low / scale)
    derived = [derive(scale, zero_point, MAX_BITS, level) for level in LEVELS]
    scales, zero_points = (to_half(torch.stack(part)) for part in zip(*derived, strict=True))
    grid = Grid(LEVELS, group_size, scales, zero_points)
    return QuantizedWeight((Codes(grid.quantize(weight), grid),))


def row(site: Site, weight: QuantizedWeight, group_size: int) -> dict[str, object]:
    """Entry of the level table; errors are not measured."""
    levels = {str(level): {"num_bits": weight.num_bits(level), "error": None} for level in LEVELS}
    facts = {"name": site.name, "tensor": site.tensor, "role": site.role, "block": site.block, "tokens": 0}
    return {**facts, "shape": list(site.shape), "group_size": group_size, "fallback": None, "levels": levels}


def main() -> None:
    """Read the arguments, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    source = ModelSource(args.model)
    layout = discover(build_skeleton(source, torch.float32))
    recipe = elastiq.recipes.rtn(levels=LEVELS, group_size=args.group_size, embeddings=True)
    fingerprint = {"model": source.fingerprint(), "recipe": recipe.to_dict(), "ranges": "min-max"}
    with CheckpointWriter(args.output, fingerprint) as writer, source.open() as tensors:
        for block in range(-1, len(layout.blocks)):
            unit = "embeddings" if block < 0 else f"block-{block:05d}"
            if unit in writer.finished():
                continue
            weights = {
                site: round_matrix(tensors.read(f"{site.name}.weight").float(), args.group_size)
                for site in layout.at(block)
            }
            writer.write_unit(unit, weights, [row(site, weight, args.group_size) for site, weight in weights.items()])
            print(unit, flush=True)
        config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
        writer.finish(base(source, layout), source.path, config, recipe, {"command": "benchmarks/make_nested.py"})


def base(source: ModelSource, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are not quantized."""
    quantized = {f"{site.name}.weight" for site in (*layout.sites, *layout.outer)}
    with source.open() as tensors:
        for name, _ in build_skeleton(source, torch.float32).named_parameters():
            if name not in quantized:
                yield name, tensors.read(name)


if __name__ == "__main__":
    main()
