"""Statistics: what is summed, how several machines' sums join, what is dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastiq.core import ElastiqError, Rows, Statistic, Stats


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
    assert torch.equal(merged.sums["abs_max"], x.abs().amax(dim=0))
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
    assert set(stats.sums) == {"diagonal"} and stats.get("hessian") is None and not stats.gradients
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
    hessian = stats.sums["hessian"]
    torch.testing.assert_close(hessian.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(hessian[:512, 512:], hessian[512:, :512].T)


@pytest.mark.parametrize("name", sorted(Statistic.registry))
def test_every_statistic_of_divided_rows(name: str) -> None:
    """Dividing what was summed is summing what was divided; parts join to the whole."""
    x, scale = rows(12), rows(1, seed=3)[0].abs() + 0.5
    weights = torch.rand(12, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    plain, divided, first, rest = (Stats.empty(6, {name}) for _ in range(4))
    plain.update(x, weights, gradient)
    divided.update(x / scale, weights, gradient)
    torch.testing.assert_close(plain.divided(scale).sums[name], divided.sums[name])
    first.update(x[:5], weights[:5], gradient[:5])
    rest.update(x[5:], weights[5:], gradient[5:])
    torch.testing.assert_close(first.merge(rest).sums[name], plain.sums[name])
    assert first.merge(Stats()).sums == {}


def test_a_statistic_of_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class statement is all it takes; the same name twice is refused."""
    monkeypatch.setattr(Statistic, "registry", dict(Statistic.registry))

    class Negative(Statistic, name="negative"):
        """[in] how many rows are negative."""

        @staticmethod
        def add(total: torch.Tensor, rows: Rows) -> torch.Tensor:
            return total + (rows.x < 0).sum(0)

        @staticmethod
        def divided(total: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return total.clone()

    stats, x = Stats.empty(6, {"negative", "mean"}), rows(9)
    stats.update(x)
    assert torch.equal(stats.sums["negative"], (x < 0).sum(0).float())
    with pytest.raises(ElastiqError, match="'negative' is taken by Negative"):
        type("Again", (Negative,), {}, name="negative")
