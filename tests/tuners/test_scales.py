"""The trained decoding against plain autograd, and training against a twin that keeps every intermediate value."""

from __future__ import annotations

import pytest
import torch
from contracts.data import weight_and_stats
from contracts.test_tuners import Memory, TwoLayers, codes_of, rounded
from naive.tuners import decode, train

from elastiq.core import Codes, QuantizedWeight, Stats
from elastiq.formats import Integer
from elastiq.solvers import RoundToNearest
from elastiq.tuners import ScaleTuning
from elastiq.tuners.training import FixedCodes


@pytest.mark.parametrize("shape", [(6, 64), (5, 70)], ids=str)
@pytest.mark.parametrize("level", [2, 5])
def test_gradients_are_those_of_plain_autograd(shape: tuple[int, int], level: int) -> None:
    (codes,) = RoundToNearest().solve(weight_and_stats(*shape)[0], Integer((2, 5), 32), Stats())
    assert isinstance(codes, Codes)
    part = FixedCodes(QuantizedWeight((codes,)), level)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (part.decode() * direction).sum().backward()
    changes = [torch.zeros_like(change, dtype=torch.float64, requires_grad=True) for change in part.trained]
    values = decode(codes, level, *changes)
    assert torch.equal(part.decode(), codes.dense(level)) and torch.allclose(values.float(), codes.dense(level))
    (values * direction).sum().backward()
    for fast, slow in zip(part.trained, changes, strict=True):
        assert fast.grad is not None and slow.grad is not None
        assert torch.allclose(fast.grad.double(), slow.grad, rtol=1e-4, atol=1e-5 * float(slow.grad.abs().max()))


def test_training_equals_its_twin() -> None:
    model = TwoLayers()
    weights = rounded(model, Integer((2, 4), 32))
    terms = codes_of(weights)
    tuner = ScaleTuning(steps=12, batch=3, rate=1e-2, holdout=4)
    tuned = tuner.tune(model, weights, (2,), Memory())
    twin = train(model, terms, 2, tuner)
    for name in terms:
        moved = (terms[name].dense(2) - twin[name]).norm()
        assert moved > 0.02 * twin[name].norm()
        read = tuned.weights[name].dequantize(2)
        assert (read - twin[name]).norm() < 0.1 * moved, "but for rounding to half precision"
