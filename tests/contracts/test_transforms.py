"""What every registered transform must do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from contracts.data import output_error, weight_and_stats
from torch import Tensor

from elastiq.core import Codes, ElastiqError, Fold, Stats, Step, Transform, fold_in, fold_out, step_from_dict
from elastiq.formats import Integer
from elastiq.parts import Hadamard
from elastiq.runtime.stored import StoredArray, StoredPart
from elastiq.solvers import GPTQ
from elastiq.transforms import ActivationAware, RandomHadamard, SmoothQuant

CASES: list[Transform] = [ActivationAware(steps=6), RandomHadamard(), RandomHadamard(seed=3), SmoothQuant()]
WIDTHS = [128, 96, 200, 65]
FORMAT = Integer((4,), 32)


def test_every_registered_transform_has_a_case() -> None:
    assert set(Step.registry["transform"]) == {type(case).name for case in CASES}


def planned(transform: Transform, width: int) -> tuple[list[Tensor], Stats, Tensor, Fold]:
    """Two matrices that read one input, its statistics, its rows, and what the transform makes of them."""
    consumers = [weight_and_stats(24, width, seed=seed)[0] for seed in (0, 1)]
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(2))
    x[:, ::37] *= 10
    stats = Stats.empty(width)
    stats.update(x)
    return consumers, stats, x, transform.plan(consumers, stats, FORMAT)


@pytest.mark.parametrize("transform", CASES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_contract(transform: Transform, width: int) -> None:
    """The function is unchanged, and the statistics are those of what the matrix is given then."""
    consumers, stats, x, fold = planned(transform, width)
    for weight in consumers:
        inner = fold.into(weight)
        moved = fold.forward(x)
        expected_output = x.double() @ weight.double().T
        torch.testing.assert_close(moved.double() @ inner.double().T, expected_output, rtol=0, atol=1e-5)
        torch.testing.assert_close(fold.out_of(inner), weight, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(inner, weight, rtol=1e-3), "it does something"
    again = transform.plan(consumers, stats, FORMAT)
    assert torch.equal(again.forward(x), fold.forward(x)), "same input, same map"
    expected, got = Stats.empty(width), fold.stats(stats)
    expected.update(fold.forward(x))
    assert got.count == 200 and got.total == 200
    for name, found in got.sums.items():
        torch.testing.assert_close(found, expected.sums[name], rtol=2e-4, atol=2e-2)
    assert {"hessian", "diagonal", "mean"} <= set(got.sums)


@pytest.mark.parametrize("transform", CASES, ids=str)
@pytest.mark.parametrize("width", [*WIDTHS, 2048, 8])
def test_what_compiled_code_is_told(transform: Transform, width: int) -> None:
    *_, x, fold = planned(transform, width)
    rotation = fold.rotation()
    if rotation is None:
        assert not isinstance(fold, Hadamard)
        return
    factors, rest = (array.double() for array in rotation)
    walsh = torch.ones(1, 1, dtype=torch.float64)
    while len(walsh) * len(rest) < width:
        walsh = torch.kron(walsh, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    assert torch.equal(rest, rest.T) and len(rest) <= max(32, width // (width & -width))
    torch.testing.assert_close((x * factors) @ torch.kron(walsh, rest), fold.forward(x.double()), rtol=0, atol=1e-5)


def test_what_cannot_be_rotated_is_refused() -> None:
    with pytest.raises(ElastiqError, match="8209 channels cannot be rotated"):  # a prime
        Hadamard.of(torch.ones(8209, dtype=torch.bool))
    with pytest.raises(ElastiqError, match="are not those of 65 channels"):
        Hadamard(torch.zeros(8, dtype=torch.uint8), 65)


@pytest.mark.parametrize("claimed", [0, -8, 63 * 8, 10**12 + 39, "x", None])
def test_a_stored_rotation_that_lies_about_its_size_is_refused(claimed: Any) -> None:
    signs = torch.arange(8, dtype=torch.uint8)
    stored = StoredPart("hadamard", "", {"signs": StoredArray(torch.uint8, (8,), 1, ())}, {"in_features": claimed})
    with pytest.raises(ElastiqError, match="hadamard"):
        stored.restore({"signs": signs})
    assert replace(stored, facts={"in_features": 64}).restore({"signs": signs}).kept()["signs"].array is signs


@pytest.mark.parametrize("transform", CASES, ids=str)
def test_folds_come_back_from_their_arrays(transform: Transform) -> None:
    *_, x, fold = planned(transform, 96)
    facts = json.loads(json.dumps(fold.facts()))
    again = type(fold).restore({name: kept.array for name, kept in fold.kept().items()}, facts)
    assert torch.equal(again.forward(x), fold.forward(x))
    assert fold.num_bits(2) == sum(8 * kept.array.nbytes for kept in fold.kept().values()) <= 16 * 96


@pytest.mark.parametrize("transform", CASES, ids=str)
def test_round_trip_as_data(transform: Transform) -> None:
    assert step_from_dict("transform", transform.to_dict()) == transform


def test_smoothing_is_the_equation_of_its_paper() -> None:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), but for a factor that all channels share."""
    consumers, stats, x, _ = planned(SmoothQuant(), 96)
    for alpha in (0.3, 0.5):
        fold = SmoothQuant(alpha).plan(consumers, stats, FORMAT)
        weight = torch.stack([w.abs().amax(0) for w in consumers]).amax(0)
        expected = x.abs().amax(0) ** alpha / weight ** (1 - alpha)
        ratio = fold.divisor() / expected
        torch.testing.assert_close(ratio, ratio.median().expand(96), rtol=2e-3, atol=0)


def test_one_after_the_other() -> None:
    """SmoothQuant, then a rotation: undone in the opposite order."""
    consumers, stats, x, first = planned(SmoothQuant(), 96)
    second = RandomHadamard().plan([first.into(weight) for weight in consumers], first.stats(stats), FORMAT)
    inner = fold_in((first, second), consumers[0])
    torch.testing.assert_close(fold_out((first, second), inner), consumers[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second.forward(first.forward(x)) @ inner.T, x @ consumers[0].T, rtol=0, atol=1e-4)
    with pytest.raises(ElastiqError, match="put it before a rotation"):
        SmoothQuant().plan(consumers, second.stats(stats), FORMAT)


def test_rounding_behind_awq_is_better_than_rounding() -> None:
    consumers, stats, _, fold = planned(ActivationAware(), 128)
    weight, format = consumers[0], Integer((3,), 32)

    def error(w: Tensor, s: Stats) -> Tensor:
        grid = format.fit(w, s)
        return grid.dequantize(grid.quantize(w), 3)

    plain = output_error(weight, error(weight, stats), stats)
    behind = output_error(weight, fold.out_of(error(fold.into(weight), fold.stats(stats))), stats)
    assert behind < 0.9 * plain


def test_a_rotation_flattens_outliers() -> None:
    """Weights with large channels have a far smaller range behind it, and GPTQ a smaller error on whole rows."""
    consumers, stats, _, fold = planned(RandomHadamard(), 128)
    weight = consumers[0].clone()
    weight[:, 5] *= 30
    inner = fold.into(weight)
    assert float(inner.abs().max()) < 0.4 * float(weight.abs().max())

    def solved(w: Tensor, s: Stats) -> Tensor:
        (term,) = GPTQ().solve(w, Integer((3,), -1), s)
        assert isinstance(term, Codes)
        return term.dense(3)

    behind = fold.out_of(solved(inner, fold.stats(stats)))
    assert output_error(weight, behind, stats) < output_error(weight, solved(weight, stats), stats)


def test_awq_is_judged_at_the_lowest_level_unless_another_is_named() -> None:
    """The scale is that of a format with this level alone; at 2 and at 8 bits they are not the same."""
    weight, stats = weight_and_stats(48, 128)

    def scale(levels: tuple[int, ...], level: int = 0) -> Tensor:
        fold = ActivationAware(level=level).plan([weight], stats, Integer(levels, 32))
        return fold.into(torch.ones(1, 128))

    at_two, at_eight = scale((2,)), scale((8,))
    assert not torch.allclose(at_two, at_eight)
    assert torch.equal(scale((2, 4, 8)), at_two) and torch.equal(scale((2, 4, 8), level=8), at_eight)
