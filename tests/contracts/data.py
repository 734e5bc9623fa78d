"""Random matrices and the statistics of their inputs, with outlier channels, never zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from elastiq.core import Stats

SHAPES = [(32, 128), (20, 96), (48, 200), (7, 65)]


def weight_and_stats(
    out_features: int = 32, in_features: int = 128, tokens: int = 600, seed: int = 0
) -> tuple[Tensor, Stats]:
    """A heavy-tailed weight [out, in] and statistics of correlated inputs, a few channels ten times larger."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(out_features, in_features, generator=generator)
    weight *= 1 + 0.5 * torch.randn(out_features, in_features, generator=generator).square()
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(tokens, in_features, generator=generator) @ (mix + 0.5 * torch.eye(in_features))
    x[:, ::37] *= 10
    stats = Stats.empty(in_features)
    stats.update(x)
    return weight, stats


def output_error(weight: Tensor, decoded: Tensor, stats: Stats) -> float:
    """tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ) in double precision."""
    hessian = stats.mean_hessian().double()
    difference, weight = (weight - decoded).double(), weight.double()
    return float(torch.trace(difference @ hessian @ difference.T) / torch.trace(weight @ hessian @ weight.T))
