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
