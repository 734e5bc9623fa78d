"""What every registered format must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contracts.data import SHAPES, weight_and_stats

from elastiq.core import Codes, ElastiqError, Format, Step
from elastiq.formats import Integer

CASES = [
    Integer(),
    Integer((4,), 32),
    Integer((1, 2), -1),
    Integer((2, 3, 4, 6, 8), 16, symmetric=True),
    Integer((3, 8), 256),
    Integer(tuple(range(1, 9)), 128),
]


def test_every_registered_format_has_a_case() -> None:
    assert set(Step.registry["format"]) == {type(case).name for case in CASES}


@pytest.mark.parametrize("format", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(format: Format, shape: tuple[int, int]) -> None:
    weight, stats = weight_and_stats(*shape)
    grid = format.fit(weight, stats)
    codes = grid.quantize(weight)
    top = grid.dequantize(codes, grid.bits)
    assert codes.shape == weight.shape and codes.dtype == torch.uint8 and int(codes.max()) < 2**grid.bits
    assert torch.equal(grid.quantize(top), codes), "re-quantizing decoded values is the identity"
    assert torch.equal(grid.dequantize(codes[:, 5:9], grid.bits, first=5), top[:, 5:9]), "columns decode on their own"
    errors = []
    for level in format.levels:
        alone = replace(format, levels=(level,)).fit(weight, stats)  # type: ignore[type-var]
        errors.append(float((weight - alone.dequantize(alone.quantize(weight), level)).square().mean()))
    assert errors == sorted(errors, reverse=True), "the error falls as bits rise"
    for level in range(1, grid.bits + 1):
        assert torch.isfinite(grid.dequantize(codes, level)).all()


@pytest.mark.parametrize("format", CASES, ids=str)
def test_bits_are_counted_exactly(format: Integer) -> None:
    weight, stats = weight_and_stats(20, 200)
    grid = format.fit(weight, stats)
    groups = -(-200 // (200 if format.group_size == -1 else format.group_size))
    for level in range(1, grid.bits + 1):
        expected = 20 * 200 * level + 20 * groups * (16 if format.symmetric else 32)
        assert Codes(grid.quantize(weight), grid).num_bits(level) == expected


def test_three_bits_cost_three_and_a_half_at_group_size_64() -> None:
    weight, stats = weight_and_stats(32, 128)
    for size, cost in ((64, 3.5), (128, 3.25)):
        grid = Integer((3,), size).fit(weight, stats)
        assert Codes(grid.quantize(weight), grid).num_bits(3) / weight.numel() == cost


@pytest.mark.parametrize("format", CASES, ids=str)
def test_scales_are_what_half_precision_stores(format: Format) -> None:
    grid = format.fit(*weight_and_stats())
    assert torch.equal(grid.scale, grid.scale.half().float()) and bool((grid.scale > 0).all())
    if not grid.symmetric:
        assert torch.equal(grid.zero_point, grid.zero_point.half().float())


@pytest.mark.parametrize("level", range(1, 9))
def test_derived_widths_keep_cells_centred(level: int) -> None:
    """Every own level's value is the middle of the values of the codes that a derived wider level splits it into."""
    grid = Integer((2, 4)).fit(*weight_and_stats())
    if level > grid.bits:
        with pytest.raises(ElastiqError, match=f"level {level} is not between 1 and 4"):
            grid.parameters(level)
        return
    codes = torch.arange(16, dtype=torch.uint8).expand(32, -1)
    own = max((r for r in grid.levels if r <= level), default=2)
    narrow, wide = sorted((own, level))
    middle = grid.dequantize(codes, wide).unflatten(1, (2**narrow, -1)).mean(dim=2)
    torch.testing.assert_close(middle, grid.dequantize(codes, narrow)[:, :: 2 ** (4 - narrow)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (((4, 3),), "must be distinct and ascend"),
        (((),), "must be distinct and ascend"),
        (((3, 3),), "must be distinct and ascend"),
        (((2, 9),), "must lie between 1 and 8"),
        (((0, 4),), "must lie between 1 and 8"),
        (((4,), 8), "group_size=8 must be 16 to 256, or -1 for the whole row"),
        (((4,), 512), "group_size=512 must be 16 to 256"),
    ],
)
def test_bad_parameters_are_refused(arguments: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        Integer(*arguments)  # type: ignore[arg-type]
