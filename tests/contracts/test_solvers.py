"""What every registered solver must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts.data import SHAPES, output_error, weight_and_stats

from elastiq.core import ElastiqError, Format, QuantizedWeight, Solver, Stats, Step, step_from_dict
from elastiq.formats import BlockScaled, Codebook, Integer, Minifloat, NormalFloat
from elastiq.solvers import GPTQ, HQQ, BitStack, DecoupleQ, Nested, RoundToNearest

CASES: list[Solver] = [
    RoundToNearest(),
    GPTQ(),
    GPTQ(act_order=True),
    GPTQ(refits=0, passes=0),
    Nested(),
    Nested(refits=0, passes=0),
    DecoupleQ(),
    HQQ(),
    HQQ(p=1.0, rounds=3),
    BitStack(rank=4),
]
FORMATS = [Integer(group_size=32), Integer((4,), -1), Integer((2, 4), 64, symmetric=True)]
BLOCKS = Integer(tuple(range(1, 9)), -1)
TABLES = [Minifloat("e2m1", 32), BlockScaled("e2m1"), NormalFloat(), Codebook((2, 3, 4))]
PAIRS = [
    (solver, format) for solver in CASES for format in ([BLOCKS] if solver.terms_by_level else FORMATS)
]
BY_ROWS = [solver for solver in CASES if solver.by_rows]


def test_every_registered_solver_has_a_case() -> None:
    assert set(Step.registry["solver"]) == {type(case).name for case in CASES}


def solve(solver: Solver, format: Format, weight: torch.Tensor, stats: Stats) -> QuantizedWeight:
    return QuantizedWeight(solver.solve(weight, format, stats))


@pytest.mark.parametrize(("solver", "format"), PAIRS, ids=str)
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
    if solver.serves_top_alone and solver.minimises == Solver.minimises:
        assert errors[-1] <= rounding * 1.001, "not worse than rounding to nearest"


@pytest.mark.parametrize("solver", BY_ROWS, ids=str)
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


@pytest.mark.parametrize("solver", BY_ROWS, ids=str)
def test_dead_channels_and_constant_weights(solver: Solver) -> None:
    weight, stats = weight_and_stats(32, 128)
    hessian, diagonal = stats.sums["hessian"], stats.sums["diagonal"]
    dead = torch.arange(0, 128, 5)
    hessian[dead], hessian[:, dead], diagonal[dead] = 0.0, 0.0, 0.0
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


@pytest.mark.parametrize("format", TABLES, ids=str)
@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=True)], ids=str)
def test_formats_that_are_not_integers(solver: Solver, format: Format) -> None:
    """Error feedback lowers the error of the output on every grid."""
    weight, stats = weight_and_stats(24, 160)
    top = format.levels[-1]
    rounding, solved = (solve(s, format, weight, stats).dequantize(top) for s in (RoundToNearest(), solver))
    assert output_error(weight, solved, stats) < 0.9 * output_error(weight, rounding, stats)


@pytest.mark.parametrize(
    ("solver", "format", "sentence"),
    [
        (Nested(), NormalFloat(), "nested: it chooses integer codes, not those of normal-float; use rtn or gptq"),
        (DecoupleQ(), NormalFloat(), "decoupleq: it solves for integer codes, not those of normal-float"),
        (HQQ(), NormalFloat(), "hqq: it solves for integer codes, not those of normal-float"),
        (BitStack(), Integer((2, 4)), r"bitstack: levels=\(2, 4\) must be 1 to n, one per block"),
    ],
)
def test_what_does_not_go_together_is_refused(solver: Solver, format: Format, sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        solver.solve(*weight_and_stats()[:1], format, weight_and_stats()[1])
