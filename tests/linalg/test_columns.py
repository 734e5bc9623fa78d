"""The inner loops: every path this machine runs against the readable one and against the naive twins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from contracts.data import weight_and_stats
from naive import solvers as naive

from elastiq.core import ElastiqError, to_half
from elastiq.linalg import columns, inverse_factor, native
from elastiq.linalg.columns import Nest

NO_GROUPS = torch.zeros(24, dtype=torch.int32)
NESTS = [Nest((2, 3, 4, 6, 8), (1, 2, 4, 8, 16)), Nest((4,), (1,)), Nest((1, 8), (3, 1)), Nest((2, 4), (1, 5), beam=1)]


@pytest.fixture(params=native.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use(None)


def group(nest: Nest, rows: int = 32, width: int = 24, seed: int = 0):  # type: ignore[no-untyped-def]
    """weight [columns, levels, rows], hessian, scale and zero [1, levels, rows], group_of."""
    weight, stats = weight_and_stats(rows, width, seed=seed)
    hessian = stats.mean_hessian() + 0.01 * torch.eye(width)
    streams = weight.T.unsqueeze(1).repeat(1, len(nest.levels), 1).contiguous()
    scale, zero = columns.fit(streams, hessian.diagonal(), nest.levels, False)
    return streams, hessian, scale[None].contiguous(), zero[None].contiguous(), torch.zeros(width, dtype=torch.int32)


@pytest.mark.parametrize("nest", NESTS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_fit_agrees_on_every_path(path: str, nest: Nest, symmetric: bool) -> None:
    streams, hessian, *_ = group(nest)
    scale, zero = columns.fit(streams, hessian.diagonal(), nest.levels, symmetric)
    native.use("torch")
    expected_scale, expected_zero = columns.fit(streams, hessian.diagonal(), nest.levels, symmetric)
    same = (scale == expected_scale) & (zero == expected_zero)
    assert float(same.float().mean()) > 0.98, "a tie between two shrinks may fall either way, nothing else"
    assert torch.equal(scale, to_half(scale)) and bool((scale > 0).all())
    assert symmetric or torch.equal(zero, to_half(zero))


def test_fit_equals_the_naive_search(path: str) -> None:
    nest = NESTS[0]
    streams, hessian, *_ = group(nest, rows=16)
    scale, zero = columns.fit(streams, hessian.diagonal(), nest.levels, False)
    importance = hessian.diagonal().double().numpy()
    expected = [
        [naive.fit_group(streams[:, k, row].double().numpy(), importance, level) for row in range(16)]
        for k, level in enumerate(nest.levels)
    ]
    same = np.isclose(torch.stack([scale, zero], dim=-1).numpy(), expected, rtol=1e-3).all(axis=-1)
    assert same.mean() > 0.95


@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_greedy_agrees_on_every_path(path: str, nest: Nest) -> None:
    streams, hessian, scale, zero, group_of = group(nest, rows=128)
    upper = inverse_factor(hessian)
    codes, error = columns.greedy(nest, streams, upper, scale, zero, group_of)
    native.use("torch")
    expected, expected_error = columns.greedy(nest, streams, upper, scale, zero, group_of)
    assert float((codes == expected).float().mean()) > 0.999
    assert float(error.square().sum()) == pytest.approx(float(expected_error.square().sum()), rel=1e-4)


@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_greedy_error_is_the_objective(path: str, nest: Nest) -> None:
    """With inverse(H) = UᵀU the squares of the scaled errors sum to (w - q) H (w - q)ᵀ, level by level."""
    streams, hessian, scale, zero, group_of = group(nest)
    codes, error = columns.greedy(nest, streams, inverse_factor(hessian), scale, zero, group_of)
    difference = (streams - columns.values(nest, codes, scale, zero, group_of)).double()
    expected = torch.einsum("clr,cd,dlr->lr", difference, hessian.double(), difference)
    torch.testing.assert_close(error.double().square().sum(0), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_descend_agrees_on_every_path_and_never_rises(path: str, nest: Nest) -> None:
    streams, hessian, scale, zero, group_of = group(nest, rows=128)
    codes, _ = columns.greedy(nest, streams, inverse_factor(hessian), scale, zero, group_of)

    def residual(codes: torch.Tensor) -> torch.Tensor:
        return streams - columns.values(nest, codes, scale, zero, group_of)

    def loss(codes: torch.Tensor) -> torch.Tensor:
        weights = torch.tensor(nest.weights).double()
        return torch.einsum(
            "clr,cd,dlr,l->r", residual(codes).double(), hessian.double(), residual(codes).double(), weights
        )

    gradient = torch.einsum("cd,dlr->clr", hessian, residual(codes)).contiguous()
    after, step = columns.descend(nest, codes, gradient, hessian, scale, zero, group_of)
    torch.testing.assert_close(residual(codes) - residual(after), step, rtol=1e-4, atol=1e-6)
    assert bool((loss(after) <= loss(codes) * (1 + 1e-5)).all())
    native.use("torch")
    expected, _ = columns.descend(nest, codes, gradient, hessian, scale, zero, group_of)
    assert float((after == expected).float().mean()) > 0.999
    assert float(loss(after).sum()) == pytest.approx(float(loss(expected).sum()), rel=1e-4)


def test_descend_equals_the_naive_pass(path: str) -> None:
    nest = Nest((2, 4), (1.0, 3.0), beam=16)
    streams, hessian, scale, zero, group_of = group(nest, rows=16, width=12)
    codes, _ = columns.greedy(nest, streams, inverse_factor(hessian), scale, zero, group_of)
    residual = streams - columns.values(nest, codes, scale, zero, group_of)
    gradient = torch.einsum("cd,dlr->clr", hessian, residual).contiguous()
    after, _ = columns.descend(nest, codes, gradient, hessian, scale, zero, group_of)
    expected = naive.descend(
        streams[:, 0].T.double().numpy(), hessian.double().numpy(), codes.T.numpy(), scale[0].double().numpy(),
        zero[0].double().numpy(), nest.levels, nest.weights,
    )  # fmt: skip
    assert (after.T.numpy() == expected).mean() > 0.98


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_refit_is_the_least_squares_step_where_it_helps(path: str, nest: Nest, symmetric: bool) -> None:
    streams, hessian, *_ = group(nest, rows=48)
    scale, zero = columns.fit(streams, hessian.diagonal(), nest.levels, symmetric)
    scale = to_half(scale * 1.07)  # off the best, so that there is something to gain
    codes, _ = columns.greedy(nest, streams, inverse_factor(hessian), scale[None], zero[None], NO_GROUPS)
    new_scale, new_zero = columns.refit(nest, codes, streams, hessian, scale, zero, symmetric)
    assert torch.equal(new_scale, to_half(new_scale)) and (symmetric or torch.equal(new_zero, to_half(new_zero)))
    improved = 0
    for k, level in enumerate(nest.levels):
        for row in range(48):
            bits = codes[:, row].double().numpy() // 2 ** (nest.bits - level)
            weight, metric = streams[:, k, row].double().numpy(), hessian.double().numpy()
            best = naive.refit_group(weight, bits, metric, None if not symmetric else float(zero[k, row]))
            loss = [
                naive.group_loss(weight, bits, metric, float(s), float(z))
                for s, z in ((scale[k, row], zero[k, row]), (new_scale[k, row], new_zero[k, row]), best)
            ]
            assert loss[1] <= loss[0] * (1 + 1e-5)
            improved += loss[1] < loss[2] + 0.02 * (loss[0] - loss[2]) + 1e-5 * loss[0]
    assert improved > 0.95 * 48 * len(nest.levels), "rounding to half precision keeps nearly all of the gain"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("nest", NESTS, ids=str)
def test_move_agrees_on_every_path(path: str, nest: Nest, symmetric: bool) -> None:
    streams, hessian, *_ = group(nest, rows=128)
    scale, zero = columns.fit(streams, hessian.diagonal(), nest.levels, symmetric)
    codes, _ = columns.greedy(nest, streams, inverse_factor(hessian), scale[None], zero[None], NO_GROUPS)
    residual = streams - columns.values(nest, codes, scale[None], zero[None], NO_GROUPS)
    gradient = columns.apply(hessian, residual)
    before = gradient.clone()
    new_scale, new_zero, step, after = columns.move(nest, codes, gradient, hessian, scale, zero, symmetric)
    assert torch.equal(gradient, before)
    now = streams - columns.values(nest, codes, new_scale[None], new_zero[None], NO_GROUPS)
    torch.testing.assert_close(residual - now, step, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(after, columns.apply(hessian, now), rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    native.use("torch")
    expected = columns.move(nest, codes, gradient, hessian, scale, zero, symmetric)
    same = (new_scale == expected[0]) & (new_zero == expected[1])
    assert float(same.float().mean()) > 0.98, "the last bit of a half may fall either way, nothing else"
    assert torch.equal(columns.refit(nest, codes, streams, hessian, scale, zero, symmetric)[0], expected[0])


@pytest.mark.parametrize("beam", [5, 16])
def test_beam_finds_what_scoring_all_codes_finds(path: str, beam: int) -> None:
    levels, weights = (2, 3, 4, 6, 8), (1.0, 2.0, 4.0, 8.0, 16.0)
    streams, hessian, scale, zero, group_of = group(Nest(levels, weights), rows=512)
    hessian = torch.eye(24)  # no error is handed on
    nest = Nest(levels, weights, beam)
    codes, _ = columns.greedy(nest, streams, hessian, scale, zero, group_of)
    values = torch.stack(
        [scale[0, k] * ((torch.arange(256)[:, None] >> (8 - r)) - zero[0, k]) for k, r in enumerate(levels)]
    )
    cost = torch.einsum(
        "lvcr,l->vcr", (streams.transpose(0, 1)[:, None] - values[:, :, None]).square(), torch.tensor(weights)
    )
    best = cost.min(dim=0).values
    found = cost.gather(0, codes.long().unsqueeze(0))[0]
    assert float((found <= best * (1 + 1e-4) + 1e-12).float().mean()) > 0.99
    assert float(found.sum()) < 1.001 * float(best.sum())


def test_threads_change_no_bit(path: str) -> None:
    nest = NESTS[0]
    streams, hessian, scale, zero, group_of = group(nest, rows=256)
    upper, threads = inverse_factor(hessian), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        codes, error = columns.greedy(nest, streams, upper, scale, zero, group_of)
        moved = columns.move(nest, codes, streams, hessian, scale[0], zero[0], False)
        descended = columns.descend(nest, codes, streams, hessian, scale, zero, group_of)
        results.append((codes, error, *moved, *descended))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ElastiqError, match="path 'quantum' does not run here; choose one of"):
        native.use("quantum")
    monkeypatch.setenv("ELASTIQ_PATH", "quantum")
    monkeypatch.setattr(native, "_chosen", None)  # put back at the end
    native.use(None)
    with pytest.raises(ElastiqError, match="ELASTIQ_PATH='quantum' does not run here"):
        native.current()
