"""A matrix a power of two times as large is read as what was read before, that power of two times as large.

Whatever is stored in half precision: scales, tables, values beside codes, low ranks, the diagonals of folds.
"""

from __future__ import annotations

import pytest
import torch
from contracts import test_compensators, test_formats, test_solvers, test_splits, test_transforms
from contracts.data import output_error, weight_and_stats

from elastiq.core import Compensator, Format, QuantizedWeight, Recipe, Site, Solver, Split, Stats, Transform
from elastiq.formats import Integer
from elastiq.pipeline.run import plan_folds, quantize_matrix
from elastiq.solvers import GPTQ, HQQ, BitStack, RoundToNearest

POWERS = [-60, -27, -17, 14, 60]
PAIRS = [
    *test_solvers.PAIRS,
    *((RoundToNearest(), format) for format in test_formats.CASES),
    *((GPTQ(), format) for format in test_solvers.TABLES),
]
ALONE = [
    (solver, format)
    for solver, format in PAIRS
    if solver.by_rows and getattr(format, "scales", "") not in ("e4m3", "double")
]
"""Those in which rows share nothing."""


def quantized(recipe: Recipe, weight: torch.Tensor, stats: Stats) -> QuantizedWeight:
    return quantize_matrix(Site("a", "linear", tuple(weight.shape), 0, "a"), weight, stats, recipe)[0]


def data(rows: int = 16, columns: int = 96, largest: float = 0.0) -> tuple[torch.Tensor, Stats]:
    """Weights so large that no scale is a subnormal number in half precision. largest: what they are scaled to."""
    weight, stats = weight_and_stats(rows, columns)
    return weight * (largest / weight.abs().max() if largest else 8), stats


def assert_moved(recipe: Recipe, weight: torch.Tensor, stats: Stats, factor: torch.Tensor) -> None:
    before, after = quantized(recipe, weight, stats), quantized(recipe, weight * factor, stats)
    assert after.powers is not None
    for level in recipe.levels:
        assert before.dequantize(level).any()
        assert torch.equal(after.dequantize(level), before.dequantize(level) * factor)
        assert after.num_bits(level) == before.num_bits(level) + (8 * len(weight) if before.powers is None else 0)


@pytest.mark.parametrize(("solver", "format"), PAIRS, ids=str)
@pytest.mark.parametrize("power", [-27, 14])
def test_a_matrix(solver: Solver, format: Format, power: int) -> None:
    # Roots, a shrinkage of a size of its own, subnormal scales: moved to where the matrix is already.
    there = isinstance(solver, (BitStack, HQQ)) or getattr(format, "number", "") == "e5m2ieee"
    weight, stats = data(largest=0.9 if there else 0.0)
    assert_moved(Recipe(format, solver), weight, stats, torch.tensor(2.0**power))


@pytest.mark.parametrize(("solver", "format"), ALONE, ids=str)
def test_rows(solver: Solver, format: Format) -> None:
    weight, stats = data()
    factor = torch.ones(len(weight), 1)
    factor[::3] = 2.0**-24
    factor[5] = 2.0**-101
    factor[7] = 2.0**13
    largest = weight.abs().amax(1, keepdim=True)
    weight = weight * torch.exp2(-torch.frexp(largest).exponent.float())  # and so it stays while a row grows
    before, after = (quantized(Recipe(format, solver), w, stats) for w in (weight, weight * factor))
    assert after.powers is not None
    for level in format.levels:
        assert torch.equal(after.dequantize(level), before.dequantize(level) * factor)


@pytest.mark.parametrize(("split", "format"), test_splits.CASES, ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_what_stands_beside_codes(split: Split, format: Format, power: int) -> None:
    weight, stats = data()
    assert_moved(Recipe(format, RoundToNearest(), splits=(split,)), weight, stats, torch.tensor(2.0**power))


@pytest.mark.parametrize("compensator", test_compensators.CASES, ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_compensators(compensator: Compensator, power: int) -> None:
    weight, stats = data(largest=0.9)  # roots of what is lost are no powers of two
    recipe = Recipe(Integer((2, 4), 32), RoundToNearest(), compensators=(compensator,))
    before, after = (quantized(recipe, w, stats) for w in (weight, weight * 2.0**power))
    for level in recipe.levels:
        assert torch.equal(after.dequantize(level), before.dequantize(level) * 2.0**power)
        shifts = before.shift(level), after.shift(level)
        assert shifts == (None, None) or torch.equal(shifts[1], shifts[0] * 2.0**power)  # type: ignore[arg-type,operator]


@pytest.mark.parametrize("transform", test_transforms.CASES, ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_folds(transform: Transform, power: int) -> None:
    """What is planned does not depend on how large the matrices of an input are in all."""
    weight, stats = data(24)
    recipe = Recipe(Integer((4, 8), 32), RoundToNearest(), transforms=(transform,))
    errors = []
    for consumer in (weight, weight * 2.0**power):
        folds = plan_folds(recipe, [consumer, consumer / 2], stats)
        site = Site("a", "linear", tuple(weight.shape), 0, "a")
        found, _ = quantize_matrix(site, consumer, stats, recipe, folds=folds)
        errors.append([output_error(consumer, found.dequantize(level), stats) for level in (4, 8)])
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
