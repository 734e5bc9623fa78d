"""Tuning as one would write it first: plain autograd in double precision, one weight after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastiq.core import Codes, Objective
from elastiq.tuners import CoDistillation, GumbelChoice, ScaleTuning, SignRound


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


@torch.no_grad()
def moved(codes: Codes, low: int, moves: Tensor, original: Tensor | None = None) -> Tensor:
    """Codes of weights that have moved by `moves` cells of level `low`: the nearest in the cell they are in now."""
    grid = codes.grid
    size, top, index = 2 ** (grid.bits - low), 2**grid.bits - 1, grid.levels.index(grid.bits)
    result = codes.codes.clone()
    for i, row in enumerate(codes.codes.tolist()):
        for j, code in enumerate(row):
            place = code + 0.5
            if original is not None and size == 1:
                group = j // grid.group_size
                lies = float(original[i, j] / grid.scale[index, i, group] + grid.zero_point[index, i, group]) + 0.5
                if min(max(math.floor(lies), 0), top) == code:
                    place = lies
            cell = math.floor(place / size + float(moves[i, j]))
            cell = min(max(cell, 0), 2**low - 1)
            inside = range(cell * size, (cell + 1) * size)
            result[i, j] = min(inside, key=lambda other: abs(other - code))
    return result


def read_moved(
    codes: Codes,
    levels: tuple[int, ...],
    level: int,
    moves: Tensor,
    scale: Tensor,
    zero: Tensor,
    original: Tensor | None = None,
) -> Tensor:
    """[out, in] float64 at `level`; moves pass gradients as if values were linear in them. scale, zero: changes."""
    grid = codes.grid
    index, group = grid.levels.index(level), torch.arange(codes.codes.shape[1]) // grid.group_size
    code = (moved(codes, levels[0], moves.detach(), original) >> (grid.bits - level)).double()
    code = code + 2.0 ** (level - levels[0]) * (moves - moves.detach())
    scales = grid.scale[index].double() * (1 + scale)
    zeros = grid.zero_point[index].double() + (2**level - 1) / 2 * zero
    stored = [x + (x.detach().half() - x.detach()) for x in (scales, zeros)]
    return stored[0][:, group] * (code - stored[1][:, group])


def train_gumbel(
    objective: Objective, terms: dict[str, Codes], levels: tuple[int, ...], tuner: GumbelChoice
) -> tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]:
    """Codes, and values at every level, of every matrix after training by Lion on samples of three codes each."""
    order = torch.randperm(len(objective), generator=torch.Generator().manual_seed(tuner.seed)).tolist()
    held, training = order[: tuner.holdout], order[tuner.holdout :]
    logits, candidates = {}, {}
    for name, codes in terms.items():
        own, size = codes.codes.long(), 2 ** (codes.grid.bits - levels[0])
        cell, last = own // size, 2 ** levels[0] - 1
        place = (own.double() + 0.5) / size - cell
        candidates[name] = [cell * size - 1, own, (cell + 1) * size]
        one = torch.stack([-tuner.strength * place, 0 * place, -tuner.strength * (1 - place)])
        one[0][cell == 0] = one[2][cell == last] = -math.inf
        logits[name] = one
    changes = {
        (name, level, kind): torch.zeros(codes.grid.scale[0].shape, dtype=torch.float64)
        for name, codes in terms.items()
        for level in levels
        for kind in ("scale", "zero")
    }
    trained = [(one, tuner.rate) for one in logits.values()]
    trained += [(change, tuner.scale_rate * tuner.falloff ** (key[1] - 2)) for key, change in changes.items()]
    means = [torch.zeros_like(tensor) for tensor, _ in trained]

    def read(name: str, level: int, share: Tensor) -> Tensor:
        grid = terms[name].grid
        index, group = grid.levels.index(level), torch.arange(share.shape[2]) // grid.group_size
        code = sum(s * (c >> (grid.bits - level)).double() for s, c in zip(share, candidates[name], strict=True))
        scales = grid.scale[index].double() * (1 + changes[name, level, "scale"])
        zeros = grid.zero_point[index].double() + (2**level - 1) / 2 * changes[name, level, "zero"]
        stored = [x + (x.detach().half() - x.detach()) for x in (scales, zeros)]
        return (stored[0][:, group] * (code - stored[1][:, group])).float()

    def hard(name: str) -> Tensor:
        return torch.nn.functional.one_hot(logits[name].detach().argmax(0), 3).permute(2, 0, 1).double()

    before = {}
    for level in levels:
        batches = [held[i : i + tuner.batch] for i in range(0, len(held), tuner.batch)]
        total = sum(len(b) * float(objective.loss(lambda name, r=level: read(name, r, hard(name)), b)) for b in batches)
        before[level] = total / len(held)
    for step in range(tuner.steps):
        shape = min(1, (step + 1) / max(1, tuner.steps // 10)) * (1 + math.cos(math.pi * step / tuner.steps)) / 2
        temperature = math.exp(
            math.log(tuner.first) + (math.log(tuner.last) - math.log(tuner.first)) * step / tuner.steps
        )
        windows = [training[i % len(training)] for i in range(step * tuner.batch, (step + 1) * tuner.batch)]
        for tensor, _ in trained:
            tensor.requires_grad_(True).grad = None

        def soft(name: str) -> Tensor:
            seed = (tuner.seed * 1_000_003 + step) * 1_000_003 + sorted(terms).index(name)  # noqa: B023
            noise = torch.rand(logits[name].shape, generator=torch.Generator().manual_seed(seed)).clamp(1e-7, 1 - 1e-7)
            return ((logits[name] - (-noise.double().log()).log()) / temperature).softmax(0)  # noqa: B023

        for level in levels:
            (objective.loss(lambda name, r=level: read(name, r, soft(name)), windows) / before[level]).backward()
        with torch.no_grad():
            for (tensor, rate), mean in zip(trained, means, strict=True):
                assert tensor.grad is not None
                tensor.sub_(shape * rate * (0.9 * mean + 0.1 * tensor.grad).sign())
                mean.copy_(0.99 * mean + 0.01 * tensor.grad)
    best = {name: one.detach().argmax(0, keepdim=True) for name, one in logits.items()}
    codes = {name: torch.stack(candidates[name]).gather(0, best[name])[0].to(torch.uint8) for name in terms}
    return codes, {name: {level: read(name, level, hard(name)).detach() for level in levels} for name in terms}


def train_moving(
    objective: Objective, terms: dict[str, Codes], levels: tuple[int, ...], tuner: SignRound | CoDistillation
) -> tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]:
    """Codes, and values at every level, of every matrix after training by signs, or by Adam and the top level too."""
    order = torch.randperm(len(objective), generator=torch.Generator().manual_seed(tuner.seed)).tolist()
    held, training = order[: tuner.holdout], order[tuner.holdout :]
    moves = {name: torch.zeros(codes.codes.shape, dtype=torch.float64) for name, codes in terms.items()}
    changes = {
        (name, level, kind): torch.zeros(codes.grid.scale[0].shape, dtype=torch.float64)
        for name, codes in terms.items()
        for level in levels
        for kind in ("scale", "zero")
    }
    trained = [(move, tuner.rate) for move in moves.values()]
    trained += [(change, tuner.scale_rate * tuner.falloff ** (key[1] - 2)) for key, change in changes.items()]
    first, second = ([torch.zeros_like(tensor) for tensor, _ in trained] for _ in range(2))

    def read(name: str, level: int) -> Tensor:
        pair = changes[name, level, "scale"], changes[name, level, "zero"]
        return read_moved(terms[name], levels, level, moves[name], *pair, objective.original(name)).float()

    before = {}
    for level in levels:
        batches = [held[i : i + tuner.batch] for i in range(0, len(held), tuner.batch)]
        total = sum(len(b) * float(objective.loss(lambda name, r=level: read(name, r), b)) for b in batches)
        before[level] = total / len(held)
    for step in range(tuner.steps):
        shape = min(1, (step + 1) / max(1, tuner.steps // 10)) * (1 + math.cos(math.pi * step / tuner.steps)) / 2
        windows = [training[i % len(training)] for i in range(step * tuner.batch, (step + 1) * tuner.batch)]
        for tensor, _ in trained:
            tensor.requires_grad_(True).grad = None
        for level in levels:
            taught = isinstance(tuner, CoDistillation) and level != levels[-1]
            top = objective.answers(lambda name: read(name, levels[-1]), windows) if taught else None
            (objective.loss(lambda name, r=level: read(name, r), windows, top) / before[level]).backward()
        with torch.no_grad():
            for i, (tensor, rate) in enumerate(trained):
                assert tensor.grad is not None
                if isinstance(tuner, SignRound):
                    tensor.sub_(shape * rate * tensor.grad.sign())
                    continue
                first[i] = 0.9 * first[i] + 0.1 * tensor.grad
                second[i] = 0.95 * second[i] + 0.05 * tensor.grad**2
                mean, spread = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.95 ** (step + 1))
                tensor.sub_(shape * rate * mean / (spread.sqrt() + 1e-12))
            for move in moves.values():
                move.clamp_(-tuner.reach, tuner.reach)
    codes = {name: moved(terms[name], levels[0], moves[name], objective.original(name)) for name in terms}
    return codes, {name: {level: read(name, level).detach() for level in levels} for name in terms}
