"""What every registered solver must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts.data import SHAPES, output_error, weight_and_stats

from elastiq.core import QuantizedWeight, Solver, Stats, Step, step_from_dict
from elastiq.formats import Integer
from elastiq.solvers import GPTQ, Nested, RoundToNearest

CASES: list[Solver] = [
    RoundToNearest(),
    GPTQ(),
    GPTQ(act_order=True),
    GPTQ(refits=0, passes=0),
    Nested(),
    Nested(refits=0, passes=0),
]
FORMATS = [Integer(group_size=32), Integer((4,), -1), Integer((2, 4), 64, symmetric=True)]


def test_every_registered_solver_has_a_case() -> None:
    assert set(Step.registry["solver"]) == {type(case).name for case in CASES}


def solve(solver: Solver, format: Integer, weight: torch.Tensor, stats: Stats) -> QuantizedWeight:
    return QuantizedWeight(solver.solve(weight, format, stats))


@pytest.mark.parametrize("solver", CASES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(solver: Solver, format: Integer, shape: tuple[int, int]) -> None:
    weight, stats = weight_and_stats(*shape)
    before = weight.clone()
    quantized = solve(solver, format, weight, stats)
    errors = [output_error(weight, quantized.dequantize(level), stats) for level in format.levels]
    assert torch.equal(weight, before), "a step does not change its input"
    assert errors == sorted(errors, reverse=True), "every further level is better"
    again = solve(solver, format, weight, stats)
    for level in range(1, format.levels[-1] + 1):
        assert torch.equal(quantized.dequantize(level), again.dequantize(level)), "same input, same codes"
    top = replace(format, levels=format.levels[-1:])
    rounding = output_error(weight, solve(RoundToNearest(), top, weight, stats).dequantize(top.levels[0]), stats)
    if not isinstance(solver, Nested):  # its top level also pays for the others
        assert errors[-1] <= rounding * 1.001, "not worse than rounding to nearest"


@pytest.mark.parametrize("solver", CASES, ids=str)
def test_rows_are_independent(solver: Solver) -> None:
    """Permuted output rows give permuted codes; a row alone gives the codes it gets among others."""
    format = Integer((2, 4), 32)
    weight, stats = weight_and_stats(40, 96)
    whole = solve(solver, format, weight, stats)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    permuted = solve(solver, format, weight[order], stats)
    part = solve(solver, format, weight[8:24], stats)
    for level in (2, 4):
        assert _nearly_equal(permuted.dequantize(level), whole.dequantize(level)[order])
        assert _nearly_equal(part.dequantize(level), whole.dequantize(level)[8:24])


def _nearly_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rare weight between two codes, where the order of sums decides, and what follows from it."""
    return float((a - b).abs().gt(1e-6).float().mean()) < 0.03


@pytest.mark.parametrize("solver", CASES, ids=str)
def test_dead_channels_and_constant_weights(solver: Solver) -> None:
    weight, stats = weight_and_stats(32, 128)
    assert stats.hessian is not None and stats.diagonal is not None
    dead = torch.arange(0, 128, 5)
    stats.hessian[dead], stats.hessian[:, dead], stats.diagonal[dead] = 0.0, 0.0, 0.0
    weight[3] = 0.0
    weight[4] = 0.25
    quantized = solve(solver, Integer((4, 8), 32), weight, stats)
    values = quantized.dequantize(8)
    assert torch.isfinite(values).all()
    assert float((values[3]).abs().max()) < 1e-3 and float((values[4] - 0.25).abs().max()) < 1e-2
    assert float((values[:, dead] - weight[:, dead]).abs().mean()) < 0.1 * float(weight.abs().mean()), "kept, not lost"


@pytest.mark.parametrize("solver", CASES, ids=str)
def test_round_trip_as_data(solver: Solver) -> None:
    assert step_from_dict("solver", solver.to_dict()) == solver
