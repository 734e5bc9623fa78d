"""What every registered compensator must do."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.data import SHAPES, weight_and_stats
from torch import Tensor

from elastiq.compensators import BiasCorrection, LowRankError
from elastiq.core import Compensator, ElastiqError, Stats, Step, step_from_dict
from elastiq.formats import Integer
from elastiq.solvers import RoundToNearest

CASES: list[Compensator] = [LowRankError(), LowRankError(2, aware=False), LowRankError(500), BiasCorrection()]


def test_every_registered_compensator_has_a_case() -> None:
    assert set(Step.registry["compensator"]) == {type(case).name for case in CASES}


def residual_of(shape: tuple[int, int], level: int = 2, mean: float = 0.7) -> tuple[Tensor, Stats, Tensor]:
    """What rounding loses, statistics of inputs of that mean, and those inputs."""
    weight, stats = weight_and_stats(*shape)
    (term,) = RoundToNearest().solve(weight, Integer((level,), 32), stats)
    x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(1)) + mean
    x[:, ::37] *= 10
    stats = Stats.empty(shape[1])
    stats.update(x)
    return weight - term.dense(level), stats, x


def output(terms: tuple, x: Tensor, level: int) -> Tensor:  # type: ignore[type-arg]
    """What the terms add to the output for x."""
    total = sum(term.product(x, level) for term in terms)
    for term in terms:
        if (shift := term.shift(level)) is not None:
            total = total + shift
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(case: Compensator, shape: tuple[int, int]) -> None:
    """The error of the output falls, at its level alone."""
    residual, stats, x = residual_of(shape)
    before = residual.clone()
    terms = case.fit(residual, stats, 2)
    assert terms and torch.equal(residual, before)
    lost = x @ residual.T
    left = lost - output(terms, x, 2)
    assert float(left.square().sum()) < float(lost.square().sum())
    assert not output(terms, x, 3).any(), "other levels read nothing of it"
    assert all(term.num_bits(3) == 0 for term in terms)
    again = case.fit(residual, stats, 2)
    assert torch.equal(output(again, x, 2), output(terms, x, 2)), "deterministic"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_terms_are_what_is_stored_of_them(case: Compensator) -> None:
    residual, stats, x = residual_of((20, 96))
    for term in case.fit(residual, stats, 4):
        kept = term.kept()
        assert {k.plane for k in kept.values()} == {4}, "it travels with the plane of its level"
        there = {name: k.array for name, k in kept.items()}
        again = type(term).restore(there, json.loads(json.dumps(term.facts())))
        torch.testing.assert_close(output((again,), x, 4), output((term,), x, 4))
        assert term.num_bits(4) == sum(16 * array.numel() for array in there.values())
        absent = type(term).restore({}, term.facts())
        assert not output((absent,), x, 2).any(), "a lower level is read without it"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip_as_data(case: Compensator) -> None:
    assert step_from_dict("compensator", case.to_dict()) == case


def test_low_rank_is_the_best_of_its_rank() -> None:
    """Against the singular values that are left, in double precision; the cost is 16 bits per factor entry."""
    residual, stats, _ = residual_of((32, 128))
    (term,) = LowRankError(5, aware=False).fit(residual, stats, 2)
    left = float((residual - term.dense(2)).double().square().sum())
    assert left == pytest.approx(float(torch.linalg.svdvals(residual.double())[5:].square().sum()), rel=1e-3)
    assert term.num_bits(2) == 16 * 5 * (32 + 128)


def test_scaling_by_the_input_serves_the_output() -> None:
    residual, stats, x = residual_of((32, 128), mean=0.0)
    left = {}
    for aware in (False, True):
        terms = LowRankError(4, aware).fit(residual, stats, 2)
        left[aware] = float((x @ residual.T - output(terms, x, 2)).square().sum())
    assert left[True] < left[False]


def test_the_mean_error_of_the_output_is_gone() -> None:
    residual, stats, x = residual_of((32, 128))
    terms = BiasCorrection().fit(residual, stats, 2)
    left = (x @ residual.T - output(terms, x, 2)).mean(0)
    assert float(left.abs().max()) < 1e-3 * float((x @ residual.T).mean(0).abs().max())


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ElastiqError, match="lorc: rank=0 must be at least 1"):
        LowRankError(0)
