"""What every registered sensitivity must do."""

from __future__ import annotations

import math

import pytest

import elastiq.sensitivity as sensitivity
from elastiq.core import EVIDENCE, Evidence, Sensitivity, Step, step_from_dict

CASES: list[Sensitivity] = [sensitivity.OutputError()]
LEVELS = (2, 3, 4, 8)


def evidence(seed: int = 0) -> Evidence:
    return Evidence(levels=LEVELS, errors={2: 0.2, 3: 0.04, 4: 0.05, 8: 1e-4}, energy=3.0)


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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip_as_data(case: Sensitivity) -> None:
    assert step_from_dict("sensitivity", case.to_dict()) == case
