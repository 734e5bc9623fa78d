"""What every registered tuner must do, on a model of two layers whose right answers are its unquantized ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from contracts.data import weight_and_stats
from torch import Tensor

from elastiq.core import Codes, ElastiqError, QuantizedWeight, RowPowers, Stats, Step, Tuner, step_from_dict, to_half
from elastiq.formats import Integer
from elastiq.parts import Diagonal, Hadamard, LowRank, Sparse
from elastiq.solvers import RoundToNearest
from elastiq.tuners import CoDistillation, GumbelChoice, ScaleTuning, SignRound

CASES: list[Tuner] = [
    ScaleTuning(steps=25, batch=3, rate=1e-2, holdout=4),
    SignRound(steps=60, batch=3, rate=2e-2, holdout=4),
    GumbelChoice(steps=60, batch=3, holdout=4),
    CoDistillation(steps=60, batch=3, rate=2e-2, holdout=4),
    ScaleTuning(steps=3, rate=30.0),
    SignRound(steps=3, scale_rate=30.0),
]
FORMATS = [
    Integer((2, 3, 5), 32),
    Integer((3,), -1),
    Integer((2, 4), 64, symmetric=True),
    Integer((2, 4), 16, scales="int6"),
]


def test_every_registered_tuner_has_a_case() -> None:
    assert set(Step.registry["tuner"]) == {type(case).name for case in CASES}


class TwoLayers:
    """relu(x aᵀ) bᵀ of 24 windows of 16 tokens each; the loss is the mean square distance to the full answer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = {"a": 20 * weight_and_stats(48, 80)[0], "b": 20 * weight_and_stats(20, 48, seed=1)[0]}
        self.x = torch.randn(24, 16, 80, generator=generator)
        self.calls = 0

    def __len__(self) -> int:
        return len(self.x)

    def loss(
        self, weight: Callable[[str], Tensor], windows: Sequence[int], second: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        self.calls += 1
        x = self.x[list(windows)]
        answer = self.answer(weight, x)
        loss = (answer - self.answer(self.weights.__getitem__, x)).square().mean()
        return loss if second is None else (loss + (answer - second[0]).square().mean()) / 2

    def answers(self, weight: Callable[[str], Tensor], windows: Sequence[int]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (self.answer(weight, self.x[list(windows)]),)

    def original(self, name: str) -> Tensor:
        return self.weights[name]

    def answer(self, weight: Callable[[str], Tensor], x: Tensor) -> Tensor:
        return (x @ weight("a").T).relu() @ weight("b").T

    def loss_of(self, weights: Mapping[str, QuantizedWeight], level: int) -> float:
        return float(self.loss(lambda name: weights[name].dequantize(level), range(len(self))))

    def left_of(
        self, weights: Mapping[str, QuantizedWeight], before: Mapping[str, QuantizedWeight], levels: Sequence[int]
    ) -> float:
        """Mean over the levels of what is left of the loss."""
        return sum(self.loss_of(weights, level) / self.loss_of(before, level) for level in levels) / len(levels)


class Memory:
    """A journal; with `last` it is stopped when it has been saved so often."""

    def __init__(self, last: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.last = last

    def load(self) -> dict[str, Tensor]:
        return self.state

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.last -= 1
        if not self.last:
            raise KeyboardInterrupt


def rounded(model: TwoLayers, format: Integer) -> dict[str, QuantizedWeight]:
    found = {}
    for name, weight in model.weights.items():
        (codes,) = RoundToNearest().solve(weight, format, Stats())
        assert isinstance(codes, Codes)
        found[name] = QuantizedWeight((replace(codes, grid=codes.grid.stored(format.scales)),))
    return found


def dressed(model: TwoLayers, format: Integer) -> dict[str, QuantizedWeight]:
    """Codes behind two folds and powers of rows, beside single weights and a low rank that belongs to one level."""
    found = {}
    for name, weight in model.weights.items():
        width = weight.shape[1]
        generator = torch.Generator().manual_seed(width)
        powers = RowPowers((torch.arange(len(weight)) % 3 - 1).to(torch.int8), width)
        folds = (
            Diagonal.of(torch.rand(width, generator=generator) + 0.5),
            Hadamard.of(torch.rand(width, generator=generator) < 0.5),
        )
        inside = folds[1].into(folds[0].into(powers.into(weight)))
        apart = inside.abs() > inside.abs().quantile(0.98)
        (codes,) = RoundToNearest().solve(inside.masked_fill(apart, 0), format, Stats())
        left, right = 0.01 * torch.randn(len(weight), 2), torch.randn(2, width)
        sides = (Sparse.at(apart, inside[apart].half()), LowRank(left.half(), right.half(), format.levels[0]))
        found[name] = QuantizedWeight((codes, *sides), folds, powers)
    return found


def codes_of(weights: Mapping[str, QuantizedWeight]) -> dict[str, Codes]:
    found = {}
    for name, weight in weights.items():
        codes = weight.terms[0]
        assert isinstance(codes, Codes)
        found[name] = codes
    return found


@pytest.mark.parametrize("tuner", CASES, ids=str)
@pytest.mark.parametrize(
    ("format", "made"), [*((format, rounded) for format in FORMATS), (FORMATS[0], dressed)], ids=str
)
def test_contract(
    tuner: Tuner, format: Integer, made: Callable[[TwoLayers, Integer], dict[str, QuantizedWeight]]
) -> None:
    model = TwoLayers()
    weights = made(model, format)
    terms = codes_of(weights)
    copies = {name: (t.codes.clone(), t.grid.scale.clone(), t.grid.zero_point.clone()) for name, t in terms.items()}
    for levels in tuner.groups(format.levels):
        model.calls = 0
        tuned = tuner.tune(model, weights, levels, Memory())
        assert model.calls == tuner.calls(len(model), levels), "the progress bar's total is true"
        assert set(tuned.before) == set(tuned.after) == set(levels)
        assert sum(tuned.after[level] / tuned.before[level] for level in levels) <= len(levels)
        assert model.left_of(tuned.weights, weights, levels) <= 1.02
        for name, (codes, scale, zero_point) in copies.items():
            assert all(map(torch.equal, (terms[name].codes, terms[name].grid.scale), (codes, scale))), "inputs stay"
            after = codes_of(tuned.weights)[name]
            was, now = weights[name], tuned.weights[name]
            assert all(a is b for a, b in zip((*was.terms[1:], *was.folds), (*now.terms[1:], *now.folds), strict=True))
            others = [i for i, level in enumerate(format.levels) if level not in levels]
            assert tuner.joint or torch.equal(after.codes, codes)
            assert after.codes.dtype == torch.uint8 and int(after.codes.max()) < 2 ** format.levels[-1]
            assert after.grid.levels == format.levels and after.grid.group_size == terms[name].grid.group_size
            assert torch.equal(after.grid.scale[others], scale[others]), "no other level is touched"
            assert torch.equal(after.grid.zero_point[others], zero_point[others])
            for values in (after.grid.scale, after.grid.zero_point):
                assert torch.equal(values, to_half(values)), "stored values are half precision"
            assert bool((after.grid.scale > 0).all())
            assert torch.equal(after.grid.stored(format.scales).scale, after.grid.scale)
        again = tuner.tune(model, weights, levels, Memory())
        for name in terms:
            read = [[each.weights[name].dequantize(r) for r in levels] for each in (again, tuned)]
            assert all(map(torch.equal, *read))


@pytest.mark.parametrize("tuner", CASES[:4], ids=str)
def test_the_loss_falls_and_codes_move_where_they_may(tuner: Tuner) -> None:
    """One level, where no other holds codes back."""
    model = TwoLayers()
    weights = rounded(model, Integer((2,), 32))
    tuned = tuner.tune(model, weights, (2,), Memory())
    assert model.loss_of(tuned.weights, 2) < 0.93 * model.loss_of(weights, 2)
    before, after = codes_of(weights), codes_of(tuned.weights)
    assert tuner.joint == any(not torch.equal(after[name].codes, before[name].codes) for name in before)


@pytest.mark.parametrize("tuner", CASES[4:], ids=str)
def test_a_step_too_large_is_given_up(tuner: Tuner) -> None:
    model = TwoLayers()
    weights = rounded(model, FORMATS[0])
    tuned = tuner.tune(model, weights, tuner.groups(FORMATS[0].levels)[0], Memory())
    assert tuned.after == tuned.before and tuned.weights is weights


@pytest.mark.parametrize("tuner", CASES[:4], ids=str)
@pytest.mark.parametrize("saves", [1, 2])
def test_stopped_and_called_again_it_gives_the_same(tuner: Tuner, saves: int) -> None:
    model = TwoLayers()
    weights = rounded(model, FORMATS[0])
    levels = tuner.groups(FORMATS[0].levels)[0]
    whole = tuner.tune(model, weights, levels, Memory())
    journal = Memory(saves)
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(model, weights, levels, journal)
    model.calls = 0
    resumed = tuner.tune(model, weights, levels, journal)
    assert model.calls < tuner.calls(len(model), levels)
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert all(torch.equal(resumed.weights[n].dequantize(2), whole.weights[n].dequantize(2)) for n in weights)


def test_wide_levels_may_be_left_alone() -> None:
    assert ScaleTuning(widest=3).groups((2, 3, 4, 8)) == [(2,), (3,)]
    assert SignRound().groups((2, 3, 4, 8)) == [(2, 3, 4, 8)]


@pytest.mark.parametrize("tuner", CASES, ids=str)
def test_round_trip_as_data(tuner: Tuner) -> None:
    assert step_from_dict("tuner", tuner.to_dict()) == tuner


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = TwoLayers()
    weights = rounded(model, FORMATS[0])
    model.weights["b"][0, 0] = torch.inf
    with pytest.raises(ElastiqError, match="scales: the loss at 2 bits is not finite after 0 steps; use a smaller"):
        ScaleTuning(steps=2).tune(model, weights, (2,), Memory())
    with pytest.raises(ElastiqError, match="scales: steps, batch, holdout, rate, falloff and fewer must be positive"):
        ScaleTuning(rate=0.0)


@pytest.mark.parametrize("kind", [SignRound, GumbelChoice, CoDistillation])
def test_a_parameter_that_is_not_positive_is_refused(kind: type[Tuner]) -> None:
    with pytest.raises(ElastiqError, match=f"{kind.name}: scale_rate must be positive"):
        kind(scale_rate=0.0)  # type: ignore[call-arg]
