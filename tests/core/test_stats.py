"""Statistics: what is summed, how several machines' sums join, what is dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastiq.core import ElastiqError, Stats


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_updates_and_merges_are_one_sum(counts: list[int], weighted: bool) -> None:
    x = rows(sum(counts))
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else torch.ones(len(x))
    merged = Stats.empty(6)
    for part, share in zip(x.split(counts), weights.split(counts), strict=True):
        one = Stats.empty(6)
        one.update(part, share if weighted else None)
        merged = merged.merge(one)
    exact = (x.double() * weights[:, None]).T @ x.double() / weights.sum()
    torch.testing.assert_close(merged.mean_hessian().double(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged.mean_diagonal(6).double(), exact.diagonal(), rtol=1e-4, atol=1e-6)
    assert merged.abs_max is not None and torch.equal(merged.abs_max, x.abs().amax(dim=0))
    assert merged.count == len(x) and merged.total == pytest.approx(float(weights.sum()), rel=1e-5)


def test_a_weight_of_two_is_the_row_twice() -> None:
    x = rows(5)
    once, twice = Stats.empty(6), Stats.empty(6)
    once.update(x, torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]))
    twice.update(torch.cat([x, x[[1, 4]]]))
    torch.testing.assert_close(once.mean_hessian(), twice.mean_hessian())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_dropped_and_counted(bad: float) -> None:
    x = rows(8)
    expected = Stats.empty(6)
    expected.update(x[2:])
    x[0, 3] = bad
    stats = Stats.empty(6)
    stats.update(x, torch.tensor([1.0, bad] + [1.0] * 6))
    assert (stats.count, stats.dropped) == (6, 2)
    torch.testing.assert_close(stats.mean_hessian(), expected.mean_hessian())


def test_only_what_is_asked_for_is_kept() -> None:
    stats = Stats.empty(6, frozenset({"diagonal"}))
    stats.update(rows(4))
    assert stats.hessian is None and stats.abs_max is None and stats.diagonal is not None
    with pytest.raises(ElastiqError, match="no Hessian was collected"):
        stats.mean_hessian()
    with pytest.raises(ElastiqError, match=r"unknown \['samples'\]; known: abs_max, abs_mean, diagonal, grad_sq"):
        Stats.empty(6, frozenset({"samples"}))


def test_nothing_seen() -> None:
    assert torch.equal(Stats.empty(6).mean_diagonal(6), torch.ones(6))


def test_a_wide_hessian_is_whole_and_symmetric() -> None:
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(2))
    stats = Stats.empty(1100, frozenset({"hessian"}))
    stats.update(x[:25])
    stats.update(x[25:])
    assert stats.hessian is not None
    torch.testing.assert_close(stats.hessian.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.hessian[:512, 512:], stats.hessian[512:, :512].T)
