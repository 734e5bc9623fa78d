"""What every registered split must do."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.data import SHAPES, output_error, weight_and_stats
from torch import Tensor

from elastiq.core import ElastiqError, Format, QuantizedWeight, SideTerm, Split, Stats, Step, step_from_dict
from elastiq.formats import Integer, Minifloat
from elastiq.parts import Sparse
from elastiq.solvers import GPTQ
from elastiq.splits import OutlierFeatures, Salient, SensitiveWeights

CASES: list[tuple[Split, Format]] = [
    (SensitiveWeights(), Integer((3,), 32)),
    (SensitiveWeights(share=0.2), Integer((2, 4), -1)),
    (OutlierFeatures(), Minifloat("int8")),
    (OutlierFeatures(threshold=3.0, relative=True), Minifloat("int4", 32)),
    (Salient(), Integer((1,), 32, symmetric=True)),
]
COUNTED = [CASES[0], CASES[2]]
"""Those whose papers say that the bits are better spent so than on the codes."""


def test_every_registered_split_has_a_case() -> None:
    assert set(Step.registry["split"]) == {type(case).name for case, _ in CASES}


def split(case: Split, format: Format, weight: Tensor, stats: Stats) -> tuple[Tensor, tuple[SideTerm, ...]]:
    rest, terms = case.split(weight, format, stats)
    assert terms
    return rest, terms


@pytest.mark.parametrize(("case", "format"), CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(case: Split, format: Format, shape: tuple[int, int]) -> None:
    """Rest and terms make the weight, to the precision of what is kept apart."""
    weight, stats = weight_and_stats(*shape)
    before = weight.clone()
    rest, terms = split(case, format, weight, stats)
    assert torch.equal(weight, before), "a step does not change its input"
    apart = sum((term.dense(format.levels[0]) for term in terms), torch.zeros_like(weight))
    rounding = 1 / 254 if isinstance(case, Salient) else 2**-11
    assert bool(((rest + apart - weight).abs() <= rounding * apart.abs().amax(1, keepdim=True) * 1.01 + 1e-7).all())
    again = split(case, format, weight, stats)
    assert torch.equal(again[0], rest) and torch.equal(again[1][0].dense(4), terms[0].dense(4)), "deterministic"


@pytest.mark.parametrize(("case", "format"), CASES, ids=str)
def test_better_than_the_codes_alone(case: Split, format: Format) -> None:
    weight, stats = weight_and_stats(48, 256)
    weight.view(-1)[::211] *= 40
    rest, terms = split(case, format, weight, stats)
    level = format.levels[0]
    with_it = QuantizedWeight((*GPTQ().solve(rest, format, stats), *terms))
    alone = QuantizedWeight(GPTQ().solve(weight, format, stats))
    errors = [output_error(weight, q.dequantize(level), stats) for q in (with_it, alone)]
    assert errors[0] < errors[1]
    if (case, format) in COUNTED:  # a bit on every weight would bring a factor of four
        more = (with_it.num_bits(level) - alone.num_bits(level)) / weight.numel()
        assert errors[0] * 4**more < errors[1]


@pytest.mark.parametrize(("case", "format"), CASES, ids=str)
def test_terms_are_what_is_stored_of_them(case: Split, format: Format) -> None:
    weight, stats = weight_and_stats(20, 96)
    _, terms = split(case, format, weight, stats)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for term in terms:
        arrays = {name: kept.array for name, kept in term.kept().items()}
        again = type(term).restore(arrays, json.loads(json.dumps(term.facts())))
        assert torch.equal(again.dense(3), term.dense(3))
        torch.testing.assert_close(again.product(x, 3), x @ term.dense(3).T, rtol=1e-4, atol=1e-5)
        few = again.product(x[:, None].bfloat16(), 3)
        torch.testing.assert_close(few, (x[:, None] @ term.dense(3).T).bfloat16(), rtol=2e-2, atol=2e-2)
        assert term.num_bits(3) == sum(8 * array.nbytes for array in arrays.values())
        assert term.shift(3) is None


@pytest.mark.parametrize(("case", "format"), CASES, ids=str)
def test_round_trip_as_data(case: Split, format: Format) -> None:
    assert step_from_dict("split", case.to_dict()) == case


def test_shares_are_kept_to() -> None:
    weight, stats = weight_and_stats(32, 128)
    for share in (0.01, 0.1):
        for case in (SensitiveWeights(share), Salient(share)):
            _, (term,) = split(case, Integer((2,), 32), weight, stats)
            assert int((term.dense(2) != 0).sum()) == pytest.approx(share * weight.numel(), rel=0.03)


def test_outlier_features_are_those_that_reach_the_threshold() -> None:
    weight, stats = weight_and_stats(32, 128)
    rest, (term,) = split(OutlierFeatures(8.0), Integer((8,), -1), weight, stats)
    outliers = stats.sums["abs_max"] >= 8.0
    assert torch.equal((term.dense(8) != 0).any(0), outliers) and not rest[:, outliers].any()
    assert OutlierFeatures(1e9).split(weight, Integer((8,)), stats)[1] == ()


@pytest.mark.parametrize("make", [lambda: SensitiveWeights(0.0), lambda: SensitiveWeights(0.6), lambda: Salient(1.0)])
def test_bad_shares_are_refused(make: object) -> None:
    with pytest.raises(ElastiqError, match=r"share=\d\.\d must be above 0 and below"):
        make()  # type: ignore[operator]


def test_places_beyond_a_row_are_refused() -> None:
    where = torch.zeros(4, 70, dtype=torch.bool)
    where[1, 69] = where[3, 2] = True
    term = Sparse.at(where, torch.tensor([1.5, -2.0]).half())
    arrays = {name: kept.array for name, kept in term.kept().items()}
    assert set(arrays) == {"values", "columns", "counts"}
    for name, wrong in (("columns", [70, 2]), ("columns", [-1, 2]), ("counts", [0, 1, 0, 2]), ("counts", [0, 2])):
        with pytest.raises(ValueError, match="single weight"):
            Sparse.restore({**arrays, name: torch.tensor(wrong, dtype=torch.int16)}, term.facts())


def inverse_diagonal(stats: Stats) -> Tensor:
    """Of the mean Hessian with a hundredth of its mean diagonal added, in double precision."""
    hessian = stats.mean_hessian().double()
    return torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).diagonal()


def test_salient_weights_are_those_of_the_criterion() -> None:
    weight, stats = weight_and_stats(12, 96)
    _, (term,) = Salient().split(weight, Integer((1,), 32, symmetric=True), stats)
    saliency = weight.double().square() / inverse_diagonal(stats)
    least = saliency.flatten().sort(descending=True).values[round(0.1 * weight.numel()) - 1]
    assert torch.equal(term.dense(1) != 0, saliency >= least)


def test_sensitive_weights_are_those_whose_absence_saves_most() -> None:
    """One round of picking, every weight tried by itself where leaving it out changes its group's scales."""
    weight, stats = weight_and_stats(5, 64)
    format, inverse = Integer((3,), 32), inverse_diagonal(stats)
    _, (term,) = SensitiveWeights(share=0.05, rounds=1).split(weight, format, stats)

    def cost(filled: Tensor, row: int, group: slice, without: int | None = None) -> float:
        grid = format.fit(filled, stats)
        error = (weight - grid.dequantize(grid.quantize(weight), 3)).double().square() / inverse
        if without is not None:
            error[row, without] = 0
        return float(error[row, group].sum())

    gain = torch.zeros(weight.shape)
    grid = format.fit(weight, stats)
    own = (weight - grid.dequantize(grid.quantize(weight), 3)).double().square() / inverse
    for row in range(5):
        for group in (slice(0, 32), slice(32, 64)):
            gain[row, group] = own[row, group].float()
            values = weight[row, group]
            for column in (group.start + int(values.argmax()), group.start + int(values.argmin())):
                filled = weight.clone()
                others = [k for k in range(group.start, group.stop) if k != column]
                filled[row, column] = weight[row, others].mean()
                gain[row, column] = cost(weight, row, group) - cost(filled, row, group, column)
    expected = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, gain.flatten().topk(16).indices, True)
    assert torch.equal((term.dense(3) != 0).flatten(), expected)


def test_relative_outliers_count_in_root_mean_squares() -> None:
    """Inputs of root mean square 2: a channel that reaches 13 is beyond 6 of them, one that reaches 11 is not."""
    x = 2.0 * torch.where(torch.rand(400, 32, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    x[0, 5], x[0, 9] = 13.0, 11.0
    stats = Stats.empty(32)
    stats.update(x)
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    rest, _ = OutlierFeatures(6.0, relative=True).split(weight, Minifloat("int8"), stats)
    assert torch.nonzero((rest == 0).all(dim=0)).flatten().tolist() == [5]


def test_the_place_of_a_salient_weight_holds_what_its_row_says_with_its_sign() -> None:
    """The mean size of the others, so that its binary weight costs them nothing; stored is the difference."""
    weight, stats = weight_and_stats(12, 64)
    rest, (term,) = Salient(0.1).split(weight, Integer((1,), -1), stats)
    where = rest != weight
    assert 0.05 * weight.numel() < int(where.sum()) <= round(0.1 * weight.numel())
    for row, chosen, filled in zip(weight, where, rest, strict=True):
        size = row[~chosen].abs().mean()
        torch.testing.assert_close(filled[chosen], size * row[chosen].sign())
    assert float((rest + term.dense(1) - weight).abs().max()) < float(weight.abs().max()) / 100
