"""Scales for the numbers of a table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .values import values

SHRINK = tuple(1.0 - 0.04 * i for i in range(14))
"""Fractions of a group's range that the clip search tries."""


def group_columns(group_size: int, in_features: int) -> int:
    """Input channels per scale; -1 is the whole row."""
    return in_features if group_size == -1 else min(group_size, in_features)


def grouped(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """[..., groups, size] of [..., in], the last group padded with `fill`."""
    return F.pad(x, (0, -x.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def largest(weight: Tensor, size: int) -> Tensor:
    """[out, groups] of the largest |weight| in each group."""
    return grouped(weight, size).abs().amax(-1)


def nearest(unit: Tensor, name: str) -> Tensor:
    """The numbers of a table nearest to `unit`."""
    ordered = values(name).to(unit.device).unique()
    at = torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, unit.contiguous())
    return ordered[at]


def fit_scales(weight: Tensor, importance: Tensor, size: int, name: str, clip: bool) -> Tensor:
    """Scale [out, groups] under which the table `name` covers each group of `weight` [out, in].

    clip: of `SHRINK` parts of the range that one with the least squared error, weighted by `importance` [in].
    """
    top = float(values(name).abs().max())
    full = largest(weight, size).clamp_min(1e-30) / top
    if not clip:
        return full
    groups, share = grouped(weight, size), grouped(importance, size)
    best, scale = torch.full_like(full, torch.inf), full.clone()
    for fraction in SHRINK:
        trial = full * fraction
        unit = groups / trial[..., None]
        loss = ((nearest(unit, name) - unit).square() * share).sum(-1) * trial.square()
        better = loss < best
        best, scale = torch.where(better, loss, best), torch.where(better, trial, scale)
    return scale
