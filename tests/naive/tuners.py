"""Scale tuning as one would write it first: plain autograd in double precision, Adam by its formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastiq.core import Codes, Objective
from elastiq.tuners import ScaleTuning


def decode(codes: Codes, level: int, scale_change: Tensor, zero_change: Tensor) -> Tensor:
    """[out, in] float64 with relative changes [out, groups] of scale and zero point."""
    grid, half_range = codes.grid, (2**level - 1) / 2
    index = grid.levels.index(level)
    group = torch.arange(codes.codes.shape[1]) // grid.group_size
    scale = (grid.scale[index].double() * (1 + scale_change))[:, group]
    zero = (grid.zero_point[index].double() + half_range * zero_change)[:, group]
    return scale * ((codes.codes >> (grid.bits - level)).double() - zero)


def train(objective: Objective, terms: dict[str, Codes], level: int, tuner: ScaleTuning) -> dict[str, Tensor]:
    """Values of every matrix after training, without rounding anything to half precision."""
    generator = torch.Generator().manual_seed(tuner.seed)
    order = torch.randperm(len(objective), generator=generator)[tuner.holdout :].tolist()
    size = {name: codes.grid.scale[0].shape for name, codes in terms.items()}
    changes = {name: [torch.zeros(size[name], dtype=torch.float64) for _ in range(2)] for name in terms}
    first = {name: [torch.zeros(size[name], dtype=torch.float64) for _ in range(2)] for name in terms}
    second = {name: [torch.zeros(size[name], dtype=torch.float64) for _ in range(2)] for name in terms}
    peak = tuner.rate * tuner.falloff ** (level - 2)
    for step in range(tuner.steps):
        rate = peak * min(1, (step + 1) / max(1, tuner.steps // 10)) * (1 + math.cos(math.pi * step / tuner.steps)) / 2
        windows = [order[i % len(order)] for i in range(step * tuner.batch, (step + 1) * tuner.batch)]
        for pair in changes.values():
            for change in pair:
                change.requires_grad_(True).grad = None
        objective.loss(lambda name: decode(terms[name], level, *changes[name]).float(), windows).backward()
        for name, pair in changes.items():
            for i, change in enumerate(pair):
                assert change.grad is not None
                first[name][i] = 0.9 * first[name][i] + 0.1 * change.grad
                second[name][i] = 0.95 * second[name][i] + 0.05 * change.grad**2
                mean, spread = first[name][i] / (1 - 0.9 ** (step + 1)), second[name][i] / (1 - 0.95 ** (step + 1))
                pair[i] = (change - rate * mean / (spread.sqrt() + 1e-12)).detach()
    return {name: decode(terms[name], level, *pair).detach().float() for name, pair in changes.items()}
