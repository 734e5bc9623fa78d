"""Walsh-Hadamard matrices times small ones: every path against the whole matrix in double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from elastiq.core import ElastiqError
from elastiq.linalg import native
from elastiq.linalg.hadamard import description, mix, walsh

SIZES = [(1, 1), (1, 7), (2, 16), (4, 9), (8, 24), (64, 18), (16, 16), (2, 65), (128, 3)]
"""Sizes of H and R."""


@pytest.fixture(autouse=True)
def default_path() -> Iterator[None]:
    yield
    native.use(None)


def case(outer: int, size: int, rows: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, factors, R, and the whole map in double precision."""
    generator = torch.Generator().manual_seed(outer + size)
    x = torch.randn(rows, outer * size, generator=generator)
    factors = torch.randn(outer * size, generator=generator)
    rest = torch.randn(size, size, generator=generator)
    rest = rest + rest.T
    return x, factors, rest, torch.kron(walsh(outer).double(), rest.double()) * factors


def test_walsh_matrices_are_orthogonal() -> None:
    for size in (1, 2, 8, 64):
        found = walsh(size)
        assert torch.equal(found.abs(), torch.ones(size, size))
        assert torch.equal(found @ found.T, size * torch.eye(size))


@pytest.mark.parametrize("path", native.paths())
@pytest.mark.parametrize(("outer", "size"), SIZES)
def test_values_and_gradients(path: str, outer: int, size: int) -> None:
    x, factors, rest, whole = case(outer, size)
    native.use(path)
    x.requires_grad_()
    y = mix(x.view(5, 1, -1), factors, rest)
    assert y.shape == (5, 1, outer * size)
    torch.testing.assert_close(y[:, 0].double(), x.double() @ whole.T, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mix(x.view(5, 1, -1), factors, rest), y)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weight[:, 0].double() @ whole, rtol=1e-4, atol=1e-4)


def test_threads_strides_and_no_rows_change_nothing() -> None:
    x, factors, rest, _ = case(64, 18, rows=200)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mix(x, factors, rest)
        torch.set_num_threads(3)
        assert torch.equal(mix(x, factors, rest), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(mix(x.T.contiguous().T, factors, rest), one)
    assert mix(x[:0], factors, rest).shape == (0, 64 * 18)


def test_other_types_and_compilers_go_through_torch() -> None:
    x, factors, rest, whole = case(8, 24)
    torch.testing.assert_close(mix(x.double(), factors, rest), x.double() @ whole.T)
    half = mix(x.bfloat16(), factors, rest)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), x.double() @ whole.T, rtol=0.1, atol=2.0)
    scaled = mix(x.bfloat16(), torch.full_like(factors, 1.3555), rest)  # between two numbers of bfloat16
    exact = x.bfloat16().double() @ (whole / factors).T * 1.3555
    assert abs(float((scaled.double() * exact).sum() / exact.square().sum()) - 1) < 1e-3
    compiled = torch.compile(lambda x: mix(x, factors, rest), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mix(x, factors, rest), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", native.paths())
def test_rows_of_another_length_are_refused(path: str) -> None:
    x, factors, rest, _ = case(4, 9)
    native.use(path)
    for wrong in (x[:, :18], torch.cat([x, x], 1), x[:, :35]):
        with pytest.raises(ElastiqError, match="rotation of 36 channels"):
            mix(wrong, factors, rest)
    with pytest.raises(ElastiqError, match="rotation of 36 channels"):
        mix(x, factors, torch.eye(8))


@pytest.mark.skipif(native.module is None, reason="compiled code is absent")
def test_the_boundary_refuses_what_is_no_rotation() -> None:
    x, factors, rest, _ = case(4, 9)
    (first, second, _), _kept = description(factors, rest)
    for wrong in ((0, second, 9), (first, 0, 9), (first, second, 0), (first, second, 12), (first, second, 7)):
        with pytest.raises(ValueError):
            native.module.mix(native.current(), wrong, x.data_ptr(), 5, 36, x.data_ptr(), 1)  # type: ignore[union-attr]
