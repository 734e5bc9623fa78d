"""What every registered split must do."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.data import SHAPES, output_error, weight_and_stats
from torch import Tensor

from elastiq.core import ElastiqError, Format, QuantizedWeight, SideTerm, Split, Stats, Step, step_from_dict
from elastiq.formats import Integer, Minifloat
from elastiq.solvers import GPTQ
from elastiq.splits import OutlierFeatures, Salient, SensitiveWeights
from elastiq.terms import Sparse

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
