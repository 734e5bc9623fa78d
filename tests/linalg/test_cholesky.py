"""The factor that hands errors on."""

from __future__ import annotations

import pytest
import torch

from elastiq.linalg import cholesky


@pytest.mark.parametrize("size", [1, 7, 96])
def test_inverse_factor_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "COLUMNS", 40)
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(size))
    hessian = x.T @ x / len(x)
    upper = cholesky.inverse_factor(hessian)
    assert torch.equal(upper, upper.triu()) and bool((upper.diagonal() > 0).all())
    torch.testing.assert_close(upper.double().T @ upper.double(), hessian.double().inverse(), rtol=1e-4, atol=1e-4)


def test_not_positive_definite() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky.inverse_factor(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize(("least", "damp", "used"), [(0.02, 0.003, 0.03), (0.2, 0.003, 0.3), (5e-5, 0.0, 1e-4)])
def test_damping_grows_tenfold_until_the_factor_exists(least: float, damp: float, used: float) -> None:
    """More than needed would round what need not be rounded; the mean of the diagonal is 1 here, but for rounding."""
    size = 40
    turned = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0].double()
    eigenvalues = torch.full((size,), (size + least) / (size - 1), dtype=torch.float64)
    eigenvalues[0] = -least
    hessian = (turned * eigenvalues) @ turned.T
    matrix, _, taken = cholesky.factor_with_retry(hessian.float(), damp, "gptq")
    assert taken == pytest.approx(used)
    torch.testing.assert_close(matrix.double(), hessian + used * torch.eye(size), rtol=1e-5, atol=1e-5)
