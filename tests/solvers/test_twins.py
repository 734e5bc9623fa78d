"""Solvers against their naive twins, and what must not change their codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts.data import output_error, weight_and_stats
from naive import solvers as naive

from elastiq.core import Codes, ElastiqError, Format, Grid, Solver, Stats
from elastiq.formats import Integer, Minifloat, NormalFloat
from elastiq.linalg import columns, streams
from elastiq.linalg.cholesky import damped
from elastiq.solvers import GPTQ, HQQ, BitStack, DecoupleQ, Nested, RoundToNearest
from elastiq.solvers.decoupleq import least_squares


def codes_of(solver: Solver, format: Integer, weight: torch.Tensor, stats: Stats) -> Codes:
    (term,) = solver.solve(weight, format, stats)
    assert isinstance(term, Codes)
    return term


@pytest.mark.parametrize("levels", [(2,), (3,), (4,), (8,)])
def test_published_gptq_equals_its_naive_twin(levels: tuple[int, ...]) -> None:
    weight, stats = weight_and_stats(16, 80)
    term = codes_of(GPTQ(damp=0.01, refits=0, passes=0), Integer(levels, 32), weight, stats)
    hessian = damped(stats.mean_hessian(), 0.01).double().numpy()
    codes, scale, zero = naive.nested(weight.double().numpy(), hessian, levels, (1.0,), 32)
    assert (term.codes.numpy() == codes).mean() > 0.98
    group = np.arange(80) // 32
    decoded = scale[0][:, group] * (codes - zero[0][:, group])
    ours, theirs = (output_error(weight, x, stats) for x in (term.dense(levels[0]), torch.from_numpy(decoded)))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_nested_equals_its_naive_twin() -> None:
    levels, weights = (2, 3, 4, 6), (1.0, 2.0, 4.0, 8.0)
    weight, stats = weight_and_stats(16, 80)
    term = codes_of(Nested(weights, damp=0.01, refits=0, passes=0, refines=0), Integer(levels, 32), weight, stats)
    hessian = damped(stats.mean_hessian(), 0.01).double().numpy()
    codes, scale, zero = naive.nested(weight.double().numpy(), hessian, levels, weights, 32)
    assert (term.codes.numpy() == codes).mean() > 0.97
    group = np.arange(80) // 32
    for k, level in enumerate(levels):
        decoded = scale[k][:, group] * ((codes >> (6 - level)) - zero[k][:, group])
        ours, theirs = (output_error(weight, x, stats) for x in (term.dense(level), torch.from_numpy(decoded)))
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("solver", [GPTQ(), GPTQ(act_order=True), Nested(), GPTQ(refits=0, passes=0)], ids=str)
@pytest.mark.parametrize("block_size", [16, 24, 1000])
def test_block_size_changes_nothing(solver: Solver, block_size: int) -> None:
    weight, stats = weight_and_stats(32, 160)
    format = Integer((2, 4), -1)
    expected = codes_of(solver, format, weight, stats)
    got = codes_of(replace(solver, block_size=block_size), format, weight, stats)  # type: ignore[type-var]
    assert float((got.codes == expected.codes).float().mean()) > 0.99
    for level in (2, 4):
        assert output_error(weight, got.dense(level), stats) == pytest.approx(
            output_error(weight, expected.dense(level), stats), rel=5e-3
        )


@pytest.mark.parametrize("solver", [GPTQ(damp=1e7, refits=0, passes=0), Nested(damp=1e7, refits=0, passes=0)], ids=str)
def test_infinite_damping_is_rounding(solver: Solver) -> None:
    """With H = c I no error can be handed on and all channels weigh the same."""
    weight, stats = weight_and_stats(32, 128)
    format = Integer((4,), 32)
    uniform = Stats(count=1, total=1.0, sums={"diagonal": torch.ones(128)})
    expected = codes_of(RoundToNearest(), format, weight, uniform)
    got = codes_of(solver, format, weight, stats)
    assert float((got.codes == expected.codes).float().mean()) > 0.999


def test_one_level_nested_is_gptq() -> None:
    weight, stats = weight_and_stats(32, 128)
    a = codes_of(Nested(), Integer((3,), 32), weight, stats)
    b = codes_of(GPTQ(), Integer((3,), 32), weight, stats)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.grid.scale, b.grid.scale)


@pytest.mark.parametrize("act_order", [False, True])
def test_every_stage_lowers_the_error(act_order: bool) -> None:
    weight, stats = weight_and_stats(64, 256)
    format = Integer((3,), 64)
    stages = [GPTQ(act_order=act_order, refits=r, passes=p) for r, p in ((0, 0), (2, 0), (2, 1), (2, 4))]
    errors = [output_error(weight, codes_of(s, format, weight, stats).dense(3), stats) for s in stages]
    if act_order:  # its scales are fixed before the pass, so there is nothing to refit there
        assert errors[0] == errors[1] > errors[2] > errors[3]
    else:
        assert errors[0] > errors[1] > errors[2] > errors[3]


def test_gptq_beats_rounding_and_nested_beats_truncation() -> None:
    weight, stats = weight_and_stats(64, 256)
    format = Integer((2, 3, 4, 6, 8), 64)
    rounding, gptq, nested = (
        [output_error(weight, codes_of(s, format, weight, stats).dense(r), stats) for r in format.levels]
        for s in (RoundToNearest(), GPTQ(), Nested())
    )
    assert gptq[-1] < rounding[-1]
    assert all(n < 0.8 * g for n, g in zip(nested[:3], gptq[:3], strict=True)), "2, 3 and 4 bits out of one code"


def test_weights_trade_levels_against_each_other() -> None:
    weight, stats = weight_and_stats(64, 256)
    format = Integer((2, 8), 64)
    low, high = (codes_of(Nested(w), format, weight, stats) for w in ((1000.0, 1.0), (1.0, 1000.0)))
    assert output_error(weight, low.dense(2), stats) < output_error(weight, high.dense(2), stats)
    assert output_error(weight, low.dense(8), stats) > output_error(weight, high.dense(8), stats)


def test_singular_hessian_is_damped_until_it_factors() -> None:
    weight, _ = weight_and_stats(16, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))  # rank 3
    stats = Stats.empty(64)
    stats.update(x)
    assert torch.isfinite(codes_of(GPTQ(damp=0.0), Integer((4,), 32), weight, stats).dense(4)).all()


def test_a_hessian_that_is_no_hessian_is_refused() -> None:
    weight, stats = weight_and_stats(16, 64)
    stats.sums["hessian"] = -torch.eye(64) + 2 * torch.diag((torch.arange(64) > 30).float())
    with pytest.raises(ElastiqError, match="gptq: the Hessian is not positive definite even with damp=1"):
        codes_of(GPTQ(), Integer((4,), 32), weight, stats)


def test_nested_wants_one_weight_per_level() -> None:
    weight, stats = weight_and_stats(16, 64)
    with pytest.raises(ElastiqError, match="nested: 2 weights for 3 levels; give one per level"):
        codes_of(Nested((1.0, 2.0)), Integer((2, 3, 4), 32), weight, stats)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ElastiqError, match=r"nested: weights=\(1.0, .*\) must be positive numbers"):
            codes_of(Nested((1.0, wrong)), Integer((2, 4), 32), weight, stats)


def test_refinement_helps_high_levels_and_leaves_low_ones() -> None:
    weight, stats = weight_and_stats(64, 256)
    format = Integer((2, 4, 6, 8), 64)
    before, after = (codes_of(Nested(refines=n), format, weight, stats) for n in (0, 6))
    for level in (2, 4):
        assert torch.equal(before.dense(level), after.dense(level))
    for level in (6, 8):
        assert output_error(weight, after.dense(level), stats) < output_error(weight, before.dense(level), stats)


@pytest.mark.parametrize("order", [False, True])
def test_threads_change_no_bit(order: bool) -> None:
    weight, stats = weight_and_stats(2 * streams.ROW_CHUNK + 20, 64)
    solver, threads = GPTQ(act_order=True) if order else Nested(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            codes = codes_of(solver, Integer((2, 4, 8), 32), weight, stats)
            assert torch.get_num_threads() == count
            found.append(codes)
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.grid.scale, found[0].grid.scale)
        assert torch.equal(other.grid.zero_point, found[0].grid.zero_point)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", [Minifloat("e2m1", 32), NormalFloat(group_size=32, scales="float")], ids=str)
def test_gptq_on_any_grid_equals_its_naive_twin(format: Format, act_order: bool) -> None:
    weight, stats = weight_and_stats(8, 72)
    (term,) = GPTQ(damp=0.01, act_order=act_order, block_size=16).solve(weight, format, stats)
    hessian = damped(stats.mean_hessian(), 0.01)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(72)
    grid = format.fit(weight, stats)
    every = [grid.dequantize(torch.full((8, 72), code).byte(), 4).double().numpy() for code in range(16)]
    numbers = [[np.array([values[row, 32 * g] for values in every]) for g in range(3)] for row in range(8)]
    _, expected = naive.gptq_on(weight.double().numpy(), hessian.double().numpy(), numbers, 32, order.tolist())
    got = term.dense(4).double().numpy()
    assert (np.abs(got - expected) < 1e-6).mean() > 0.97
    ours, theirs = (output_error(weight, torch.from_numpy(x), stats) for x in (got, expected))
    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_floating_part_of_decoupleq_equals_its_naive_twin(symmetric: bool) -> None:
    """All scales and zero points of a row together, to half precision."""
    weight, stats = weight_and_stats(10, 80)
    hessian = damped(stats.mean_hessian(), 0.01)
    grid = Integer((3,), 32, symmetric).fit(weight, stats)
    codes = grid.quantize(weight)
    refitted = least_squares(weight, hessian, codes, grid)
    for row in range(10):
        w, c = weight[row].double().numpy(), codes[row].double().numpy()
        expected = naive.refit_row(w, c, hessian.double().numpy(), 32, symmetric, 3.5)
        best = (w - expected) @ hessian.double().numpy() @ (w - expected)
        got = w - refitted.dequantize(codes, 3)[row].double().numpy()
        assert best * (1 - 1e-6) <= got @ hessian.double().numpy() @ got <= best * 1.01
    before, after = (output_error(weight, g.dequantize(codes, 3), stats) for g in (grid, refitted))
    assert after < before


def test_bitstack_equals_its_naive_twin() -> None:
    weight, stats = weight_and_stats(16, 48)
    (term,) = BitStack(rank=3).solve(weight, Integer((1, 2, 3, 4), -1), stats)
    size = stats.mean_diagonal(48).sqrt().double().numpy()
    for level, expected in enumerate(naive.sign_stack(weight.double().numpy(), size / size.mean(), 3, 4), start=1):
        close = np.abs(term.dense(level).double().numpy() - expected) < 0.02 * np.abs(weight).max().item()
        assert close.mean() > 0.98, "but for signs of what is nearly nothing"
        assert term.num_bits(level) == level * (16 * 48 + 16 * 3 * (16 + 48))


def test_more_rounds_of_decoupleq_are_not_worse() -> None:
    weight, stats = weight_and_stats(24, 128)
    format = Integer((2,), 32)
    errors = [
        output_error(weight, codes_of(DecoupleQ(rounds=rounds), format, weight, stats).dense(2), stats)
        for rounds in (1, 2, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < output_error(weight, codes_of(RoundToNearest(), format, weight, stats).dense(2), stats) / 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_equals_its_naive_twin(bits: int) -> None:
    weight, stats = weight_and_stats(12, 80)  # the last group has 16 columns
    term = codes_of(HQQ(), Integer((bits,), 32), weight, stats)
    assert isinstance(term.grid, Grid)
    for row in range(12):
        for index, first in enumerate(range(0, 80, 32)):
            group = weight[row, first : first + 32].double().numpy()
            scale, zero = naive.hqq(group, bits)
            assert float(term.grid.scale[0, row, index]) == pytest.approx(scale, rel=1e-3)
            values = term.dense(bits)[row, first : first + 32].double().numpy()
            codes = np.clip(np.rint(group / scale + zero), 0, 2**bits - 1)
            ours, theirs = ((np.abs(group - v) ** 0.7).sum() for v in (values, scale * (codes - zero)))
            assert ours == pytest.approx(theirs, rel=0.02)


def test_hqq_minimises_what_it_says() -> None:
    """The sum of |error|^p falls below that of the range's own zero point, most at few bits; squares may rise."""
    weight, stats = weight_and_stats(64, 256)
    for bits, gain in ((2, 0.97), (4, 1.0)):
        losses = []
        for rounds in (1, 20):
            term = codes_of(HQQ(rounds=rounds), Integer((bits,), 64), weight, stats)
            losses.append(float((weight - term.dense(bits)).abs().pow(0.7).sum()))
        low, high = weight.unflatten(1, (-1, 64)).aminmax(dim=-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        plain = ((weight.unflatten(1, (-1, 64)) - low) / scale).round() * scale + low
        start = float((weight - plain.flatten(1)).abs().pow(0.7).sum())
        assert losses[1] <= losses[0] <= start * 1.001 and losses[1] < gain * start


def test_refinement_weighs_the_high_levels_by_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by those that stand first: 6 and 8 bits count 5 and 7 here, in every sweep that leaves low bits alone."""
    seen = []
    descend = columns.descend
    monkeypatch.setattr(columns, "descend", lambda nest, *rest: (seen.append(nest), descend(nest, *rest))[1])
    weight, stats = weight_and_stats(8, 64)
    codes_of(Nested((1.0, 3.0, 5.0, 7.0), refines=2, passes=1), Integer((2, 4, 6, 8), 32), weight, stats)
    refining = [(nest.levels, nest.weights) for nest in seen if nest.keep]
    assert refining == [((6, 8), (5.0, 7.0))] * 4, "two sweeps over two groups"
    assert {(nest.levels, nest.weights) for nest in seen if not nest.keep} == {((2, 4, 6, 8), (1.0, 3.0, 5.0, 7.0))}


def test_the_clip_search_of_a_format_weighs_errors_by_the_hessians_diagonal() -> None:
    """A channel that is hardly used may be clipped: the naive search with these weights finds the same scales, and one
    with equal weights finds others."""
    weight, stats = weight_and_stats(24, 64)
    grid = Integer((3,), 32).fit(weight, stats)
    agreed = []
    for importance in (stats.mean_diagonal(64).double().numpy(), np.ones(64)):
        fitted = [
            [naive.fit_group(row[at].double().numpy(), importance[at], 3)[0] for at in (slice(32), slice(32, 64))]
            for row in weight
        ]
        agreed.append(float((grid.scale[0] == torch.tensor(fitted).float()).float().mean()))
    assert agreed[0] > 0.9 and agreed[1] < 0.8
