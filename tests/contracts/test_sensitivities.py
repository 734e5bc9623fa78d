"""What every registered sensitivity must do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import elastiq.sensitivity as sensitivity
from elastiq.core import EVIDENCE, Damage, Evidence, Sensitivity, Stats, Step, step_from_dict

CASES: list[Sensitivity] = [
    sensitivity.ActivationSpikes(),
    sensitivity.BlockChange(),
    sensitivity.CanonicalCorrelation(directions=4),
    sensitivity.Decoupled(),
    sensitivity.EmpiricalFisher(),
    sensitivity.EndToEndKL(),
    sensitivity.GradientMagnitude(),
    sensitivity.HessianEigenvalue(),
    sensitivity.HessianTrace(),
    sensitivity.OutputError(),
    sensitivity.PruningSensitivity(),
    sensitivity.SampledFisher(),
    sensitivity.SpectralEnergy(),
    sensitivity.TaylorTerm(),
    sensitivity.WeightOutliers(),
]
LEVELS = (2, 3, 4, 8)
SHAPE = (24, 40)


def evidence(seed: int = 0, importance: float = 1.0) -> Evidence:
    """Everything there is to know about a random matrix; `importance` scales what says how much it matters. Level 4 is
    a little worse than level 3, as measurements can be."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=generator)
    noise = {level: torch.randn(SHAPE, generator=generator) * 2.0**-level for level in LEVELS}
    noise[4] = 1.1 * noise[3]
    stats = Stats.empty(SHAPE[1])
    stats.update(torch.randn(64, SHAPE[1], generator=generator))
    gradient = torch.randn(SHAPE, generator=generator) * importance
    draws = torch.randn(7, generator=generator)
    hidden = torch.randn(200, 16, generator=generator)
    return Evidence(
        levels=LEVELS,
        errors={level: float(noise[level].square().mean()) for level in LEVELS},
        energy=3.0 * importance,
        weight=weight,
        quantized=lambda level: weight + noise[level],
        stats=stats,
        gradient=gradient,
        fisher=gradient.square(),
        trace=5.0 * importance,
        eigenvalue=0.5 * importance,
        block_input=hidden,
        block_output=hidden + importance * torch.randn(200, 16, generator=generator),
        slopes={level: (gradient * change).sum() * draws for level, change in noise.items()},
        drawn=gradient.square(),
        damage=lambda level: Damage(importance * float(noise[level].square().mean()), importance * 2.0**-level),
    )


def test_every_registered_sensitivity_has_a_case() -> None:
    assert set(Step.registry["sensitivity"]) == {type(case).name for case in CASES}
    assert all(case.needs <= EVIDENCE for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(3))
def test_contract(case: Sensitivity, seed: int) -> None:
    """A finite loss for every level, never negative, never rising; the same again for the same evidence."""
    losses = case.measure(evidence(seed))
    assert tuple(losses) == LEVELS
    values = list(losses.values())
    assert all(math.isfinite(value) and value >= 0 for value in values)
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]
    assert losses == case.measure(evidence(seed))
    rows = case.rows(evidence(seed))
    if rows is not None:
        assert rows.shape == (len(LEVELS), SHAPE[0]) and bool(rows.isfinite().all()) and bool((rows >= 0).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip_as_data(case: Sensitivity) -> None:
    assert step_from_dict("sensitivity", case.to_dict()) == case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_what_is_asked_for_is_looked_at(case: Sensitivity) -> None:
    fields = {"weight": ("weight", "quantized"), "blocks": ("block_input", "block_output")}
    fields["slopes"] = ("slopes", "drawn")
    wanted = {name for need in case.needs for name in fields.get(need, (need,))}
    everything = evidence()
    table = {"levels", "errors", "energy"}
    hidden = {field.name: None for field in dataclasses.fields(Evidence) if field.name not in wanted | table}
    assert case.measure(dataclasses.replace(everything, **hidden)) == case.measure(everything)


UNMOVED = {"pruning", "spectral-energy", "spikes", "weight-outliers"}
"""What looks at the weight and its input alone."""


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in UNMOVED], ids=lambda case: case.name)
def test_what_matters_more_loses_more(case: Sensitivity) -> None:
    assert case.measure(evidence(importance=3.0))[2] > case.measure(evidence(importance=0.3))[2]


def test_hessian_weighted_losses_are_their_formulas() -> None:
    e = evidence()
    assert e.weight is not None and e.fisher is not None and e.gradient is not None
    change = e.change(2).double()
    second, first = float((e.fisher * change**2).sum() / 2), float((e.gradient * change).abs().sum())
    assert sensitivity.EmpiricalFisher().measure(e)[2] == pytest.approx(second, rel=1e-5)
    assert sensitivity.GradientMagnitude().measure(e)[2] == pytest.approx(first, rel=1e-5)
    shares = sensitivity.SampledFisher().rows(e)
    assert shares is not None and e.drawn is not None and e.slopes is not None
    torch.testing.assert_close(shares[0].double(), (e.drawn * change**2).sum(dim=1) / 2)
    assert sensitivity.SampledFisher().measure(e)[8] == pytest.approx(float((e.slopes[8] ** 2).mean() / 2))
    square = float((change**2).sum())
    assert sensitivity.HessianTrace().measure(e)[2] == pytest.approx(0.5 * 5.0 / (24 * 40) * square, rel=1e-5)
    assert sensitivity.HessianEigenvalue().measure(e)[2] == pytest.approx(0.25 * square, rel=1e-5)
    expected = float((e.gradient * change).sum().abs() + (e.fisher * change**2).sum() / 2)
    assert sensitivity.TaylorTerm().measure(e)[2] == pytest.approx(expected, rel=1e-5)


def test_spikes_pin_a_matrix_high() -> None:
    plain, spiking = evidence(), evidence()
    assert spiking.stats is not None
    spiking.stats.sums["abs_max"][3] = 1e4
    case = sensitivity.ActivationSpikes()
    assert case.measure(spiking)[2] == pytest.approx(case.weight * case.measure(plain)[2])


def test_canonical_correlation_sees_a_linear_block() -> None:
    e = evidence()
    assert e.block_input is not None
    mixed = e.block_input @ torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    linear = dataclasses.replace(e, block_output=mixed)
    case = sensitivity.CanonicalCorrelation(directions=16)
    assert case.measure(linear)[2] == pytest.approx(0.0, abs=1e-6) and case.measure(e)[2] > 1e-3
