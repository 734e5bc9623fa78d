"""Powers of two of rows, and what 16-bit floats hold."""

from __future__ import annotations

import pytest
import torch

from elastiq.core import ElastiqError, RowPowers, common_power, held, require_held

ORDINARY = torch.tensor([[0.5, -0.25], [0.003, 0.0], [0.0, 0.0], [900.0, 1.0]])


def test_ordinary_rows_have_none() -> None:
    assert RowPowers.of(ORDINARY) is None
    assert RowPowers.of(torch.zeros(3, 2)) is None
    assert common_power([ORDINARY, 1e-9 * ORDINARY]) == 1.0


def test_a_row_that_stands_out_gets_its_own() -> None:
    weight = ORDINARY.clone()
    weight[1] = torch.tensor([1e-5, -3e-7])
    powers = RowPowers.of(weight)
    assert powers is not None and powers.exponent.tolist() == [0, -16, 0, 0]  # 2^-17 < 1e-5 < 2^-16
    assert torch.equal(powers.into(weight)[1], weight[1] * 2.0**16)
    assert torch.equal(powers.out_of(powers.into(weight)), weight)
    assert powers.num_bits(1) == 8 * 4


@pytest.mark.parametrize("power", [-149, -130, -40, -17, 17, 40, 120])
def test_a_matrix_that_is_small_or_large_moves_as_a_whole(power: int) -> None:
    """Its rows keep their proportions, and everything is exact down to the smallest float32."""
    weight = torch.tensor([[1.0, -1.0], [0.5, 0.25]]).double().mul(2.0**power).float()
    powers = RowPowers.of(weight)
    assert powers is not None and len(set(powers.exponent.tolist())) == 1
    inner = powers.into(weight)
    assert power == -149 or inner.abs().amax() in (0.5, 2.0**-4)
    assert torch.equal(powers.out_of(inner), weight)


def test_a_foreign_exponent_makes_a_number() -> None:
    powers = RowPowers.restore({"exponent": torch.tensor([-128, 127, 0], dtype=torch.int8)}, {"shape": [3, 5]})
    assert powers.factor.tolist() == [2.0**-126, 2.0**127, 1.0]
    with pytest.raises(ValueError, match=r"exponents are torch.float16 \[3\], not int8 \[3\]"):
        RowPowers.restore({"exponent": torch.zeros(3).half()}, {"shape": [3, 5]})


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 65504.0], torch.float16),
        ([1.0, 1e5], torch.bfloat16),
        ([[1.0, 1e-9], [1e-4, 0.0]], torch.float16),
        ([[1.0, 1e-9], [1e-5, 0.0]], torch.bfloat16),
        ([[1.0], [0.0]], torch.float16),
        ([float("inf")], torch.bfloat16),
        (1e-8, torch.bfloat16),
        ([], torch.float16),
    ],
)
def test_what_half_precision_does_not_hold_becomes_bfloat16(values: object, dtype: torch.dtype) -> None:
    tensor = torch.tensor(values)
    assert held(tensor, torch.float16).dtype == dtype
    assert held(tensor, torch.float32) is tensor
    assert held(tensor.half(), torch.float16).dtype == torch.float16, "what is half precision stays so"


def test_what_cannot_be_computed_with_is_refused() -> None:
    for largest, said in ((1e5, "1e\\+05"), (1e-8, "1e-08")):
        with pytest.raises(ElastiqError, match=f"a.norm: its largest number, {said}, is none that float16 can hold"):
            require_held(torch.tensor([0.0, largest]), torch.float16, "a.norm")
        require_held(torch.tensor([0.0, largest]), torch.bfloat16, "a.norm")
    require_held(torch.tensor([0.0, 1e-8, 3.0]), torch.float16, "a.norm")
    require_held(torch.zeros(3), torch.float16, "a.norm")
