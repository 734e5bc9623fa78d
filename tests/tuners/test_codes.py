"""Codes that are trained, against twins that go from weight to weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from contracts.data import weight_and_stats
from contracts.test_tuners import Memory, TwoLayers, codes_of, rounded
from naive.tuners import moved, read_moved, train_gumbel, train_moving

from elastiq.core import Codes, QuantizedWeight, Stats, Tuned
from elastiq.formats import Integer
from elastiq.parts import Hadamard, Sparse
from elastiq.solvers import RoundToNearest
from elastiq.tuners import CoDistillation, GumbelChoice, SignRound
from elastiq.tuners.gumbel import _Choice
from elastiq.tuners.training import MovingCodes, Part

LEVELS = (2, 3, 5)


def kept(
    weights: Mapping[str, QuantizedWeight], parts: Mapping[str, Part], before: dict[int, float], after: dict[int, float]
) -> Tuned:
    return Tuned({name: part.finished() for name, part in parts.items()}, before, after)


def matrix(levels: tuple[int, ...] = LEVELS) -> Codes:
    (codes,) = RoundToNearest().solve(weight_and_stats(6, 70)[0], Integer(levels, 32), Stats())
    assert isinstance(codes, Codes)
    return codes


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("levels", [LEVELS, (3, 5), (5,)], ids=str)
def test_moved_codes_and_their_gradients(levels: tuple[int, ...], known: bool) -> None:
    codes = matrix()
    original = weight_and_stats(6, 70)[0] if known else None
    part = MovingCodes(QuantizedWeight((codes,)), levels, 1.0, original)
    moves = 0.6 * torch.randn(codes.codes.shape, generator=torch.Generator().manual_seed(1))
    part.moves.data.copy_(moves)
    moves = moves.clamp(-1, 1)
    assert torch.equal(part.codes(), moved(codes, levels[0], moves, original))
    assert not torch.equal(part.codes(), codes.codes)
    for level in levels:
        direction = torch.randn(codes.codes.shape, generator=torch.Generator().manual_seed(2))
        slow = [moves.double(), *(torch.zeros(codes.grid.scale[0].shape, dtype=torch.float64) for _ in range(2))]
        for tensor in slow:
            tensor.requires_grad_()
        values = read_moved(codes, levels, level, *slow, original)
        assert torch.allclose(part.decode(level), values.float(), atol=1e-6)
        (part.decode(level) * direction).sum().backward()
        (values * direction).sum().backward()
        for fast, twin in zip([part.moves, *part.trained[level]], slow, strict=True):
            assert fast.grad is not None and twin.grad is not None
            assert torch.allclose(fast.grad.double(), twin.grad, rtol=1e-4, atol=1e-5 * float(twin.grad.abs().max()))
            fast.grad = None


def test_places_start_where_the_weights_are() -> None:
    """A small move takes those to the next code that lie at the edge of theirs, behind folds and beside side terms too;
    a weight whose code is not the nearest starts in the middle of it, one beyond the grid does not come in."""
    weight = weight_and_stats(6, 64)[0]
    fold = Hadamard.of(torch.arange(64) % 3 == 0)
    apart = torch.zeros(6, 64, dtype=torch.bool).index_fill(1, torch.tensor([5]), True)
    side = Sparse.at(apart, fold.into(weight)[apart].half())
    target = fold.into(weight) - side.dense(2)
    (codes,) = RoundToNearest().solve(target, Integer((2,), 32), Stats())
    assert isinstance(codes, Codes)
    scale, zero = (x[0].repeat_interleave(32, 1) for x in (codes.grid.scale, codes.grid.zero_point))
    place = target / scale + zero + 0.5
    other = codes.codes.clone()
    other[0] = (codes.codes[0] + 1) % 4
    for moved_to in (0.1, -0.1):
        part = MovingCodes(QuantizedWeight((replace(codes, codes=other), side), (fold,)), (2,), 0.5, weight)
        part.moves.data.fill_(moved_to)
        assert torch.equal(part.codes()[0], other[0])
        assert torch.equal(part.codes()[1:], (place + moved_to).floor().clamp(0, 3)[1:].to(torch.uint8))
        assert 0.02 < float((part.codes() != other).float().mean()) < 0.2


def test_single_codes_move_at_the_default_rate() -> None:
    """From rounding, as in AutoRound; what is trained beside them, scales, gives less."""
    model = TwoLayers()
    weights = rounded(model, Integer((2,), 32))
    moving, still = (tuner.tune(model, weights, (2,), Memory()) for tuner in (SignRound(), SignRound(rate=1e-9)))
    changed = [codes_of(moving.weights)[name].codes != codes.codes for name, codes in codes_of(weights).items()]
    assert all(0.01 < float(each.float().mean()) < 0.2 for each in changed)
    assert model.loss_of(moving.weights, 2) < 0.9 * model.loss_of(still.weights, 2)


@pytest.mark.parametrize(
    "tuner",
    [
        SignRound(steps=12, batch=3, rate=1.2e-2, scale_rate=6e-3, holdout=4),
        CoDistillation(steps=12, batch=3, rate=2e-2, scale_rate=6e-3, holdout=4),
        GumbelChoice(steps=12, batch=3, rate=1.0, strength=6.0, scale_rate=6e-3, holdout=4),
    ],
    ids=lambda tuner: tuner.name,
)
def test_training_equals_its_twin(
    tuner: SignRound | CoDistillation | GumbelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TwoLayers()
    weights = rounded(model, Integer((2, 5), 32))
    terms = codes_of(weights)
    twin = train_gumbel if isinstance(tuner, GumbelChoice) else train_moving
    twin_codes, twin_values = twin(model, terms, (2, 5), tuner)  # type: ignore[operator]
    monkeypatch.setattr("elastiq.tuners.gumbel.kept_if_better", kept)  # so few steps at so high a rate gain nothing
    tuned = tuner.tune(model, weights, (2, 5), Memory())
    for name, codes in terms.items():
        assert int((codes.codes != twin_codes[name]).sum()) > 5
        trained = codes_of(tuned.weights)[name].codes
        assert int((trained != twin_codes[name]).sum()) < 3, "but for signs of gradients near zero"
        for level in (2, 5):
            read = tuned.weights[name].dequantize(level)
            assert (read - twin_values[name][level]).norm() < 0.05 * (read - codes.dense(level)).norm()


def test_the_sampled_choice_by_hand() -> None:
    """One weight after the other: the candidates, their shares, the mixture at every level."""
    codes, temperature = matrix(), 0.7
    part = _Choice(QuantizedWeight((codes,)), LEVELS, strength=6.0)
    uniform = torch.rand(3, *codes.codes.shape, generator=torch.Generator().manual_seed(5)).clamp(1e-7, 1 - 1e-7)
    size = 2 ** (codes.grid.bits - LEVELS[0])
    for level in LEVELS:
        values = part.sample(level, temperature, torch.Generator().manual_seed(5))
        index = codes.grid.levels.index(level)
        for i, row in enumerate(codes.codes.tolist()):
            for j, code in enumerate(row):
                cell, group = code // size, j // codes.grid.group_size
                place = (code + 0.5) / size - cell
                known = {1: (code, 0.0)}
                if cell > 0:
                    known[0] = (cell * size - 1, -6.0 * place)
                if cell < 2 ** LEVELS[0] - 1:
                    known[2] = ((cell + 1) * size, -6.0 * (1 - place))
                noise = {k: float(-(-uniform[k, i, j].double().log()).log()) for k in known}
                score = torch.tensor([(known[k][1] + noise[k]) / temperature for k in known], dtype=torch.float64)
                read = torch.tensor([known[k][0] >> (codes.grid.bits - level) for k in known], dtype=torch.float64)
                mean = float((score.softmax(0) * read).sum())
                scale, zero = (float(x[index, i, group]) for x in (codes.grid.scale, codes.grid.zero_point))
                assert float(values[i, j].detach()) == pytest.approx(scale * (mean - zero), abs=1e-4 * scale)
    finished = part.finished()
    assert torch.equal(codes_of({"": finished})[""].codes, codes.codes), "nothing is trained yet"
    assert all(torch.equal(finished.dequantize(level), codes.dense(level)) for level in LEVELS)
