"""Diagonal folds moved out of a matrix's input, into what comes before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core import Fold, Site
from .stream import BlockStream


@dataclass
class Absorbed:
    """What a block looks like when folds are done by what comes before their matrices.

    inputs: input_ids whose first fold is done already. rows: site -> [out] by which its rows are to be divided.
    factors: parameter that is not quantized -> what it is to be multiplied by.
    """

    inputs: set[str] = field(default_factory=set)
    rows: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)


def absorb(stream: BlockStream, block: int, sites: Sequence[Site], folds: Mapping[str, Sequence[Fold]]) -> Absorbed:
    """Where the divisors of each input's first fold can go without a change of what `block` computes.

    A norm takes them into its weight (and bias), a matrix into its rows. Which one can is found by trying those of the
    right size with random divisors on calibration text; where none can, the fold stays at the matrix's input.
    """
    found = Absorbed()
    shapes = stream.parameters(block)
    matrices = {site.name: site for site in sites if site.expert is None}
    for name, (first, *_) in folds.items():
        divisor = first.divisor()
        readers = [site for site in sites if site.input_id == name]
        if divisor is None or any(site.expert is not None for site in readers):
            continue
        random = torch.randn(len(divisor), generator=torch.Generator().manual_seed(0)).mul(0.5).exp()
        inner = {f"{s.name}.weight": random[:, None] if s.transposed else random for s in readers}
        norms = (n.removesuffix(".weight") for n, s in shapes.items() if n.endswith(".weight") and s == random.shape)
        fitting = (site.name for site in matrices.values() if site.shape[0] == len(random))
        taken = inner.keys() | found.factors.keys() | {f"{giver}.weight" for giver in found.rows}
        for giver in (*norms, *fitting):
            outer = _divided(giver, matrices.get(giver), random, shapes)
            if not taken & outer.keys() and stream.unchanged(block, inner | outer):
                found.inputs.add(name)
                found.factors |= _divided(giver, matrices.get(giver), divisor, shapes)
                if giver in matrices:
                    found.rows[giver] = divisor
                    del found.factors[f"{giver}.weight"]
                break
    return found


def _divided(giver: str, site: Site | None, by: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What divides the outputs of a norm or of the matrix `site`: factors of its parameters."""
    rows = 1 / by[:, None] if site is not None and not site.transposed else 1 / by
    bias = {f"{giver}.bias": 1 / by} if f"{giver}.bias" in shapes else {}
    return {f"{giver}.weight": rows} | bias
