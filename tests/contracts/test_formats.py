"""What every registered format must do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contracts.data import SHAPES, weight_and_stats

from elastiq.core import Codes, ElastiqError, Format, SideTerm, Step, step_from_dict
from elastiq.formats import BlockScaled, Codebook, Integer, Minifloat, NormalFloat

INTEGERS = [
    Integer(),
    Integer((4,), 32),
    Integer((1, 2), -1),
    Integer((2, 3, 4, 6, 8), 16, symmetric=True),
    Integer((3, 8), 256),
    Integer(tuple(range(1, 9)), 128),
    Integer((2, 3, 4), 16, scales="int6"),
    Integer((2, 4), 32, True, "e4m3-row"),
]
TABLES: list[Format] = [
    *(Minifloat(number) for number in ("e4m3fn", "e5m2ieee", "e3m4", "e2m3", "e3m2", "e2m1")),
    Minifloat("e2m1", 32, "e4m3", clip=False),
    Minifloat("e2m1", 16, "int6"),
    Minifloat("int3", 32, "int6"),
    *(BlockScaled(number) for number in ("e4m3fn", "e5m2ieee", "e2m3", "e3m2", "e2m1", "int8", "int4")),
    BlockScaled("int4", round_up=True),
    BlockScaled("e2m1", 16, "e4m3"),
    BlockScaled("int4", 16, "e4m3"),
    NormalFloat(),
    NormalFloat("fp4", 32, "float"),
    Codebook(),
    Codebook((3, 4, 5, 6)),
]
CASES: list[Format] = [*INTEGERS, *TABLES]
FAMILIES: list[list[Format]] = [
    [Minifloat("e2m1"), Minifloat("e2m3"), Minifloat("e4m3fn"), Minifloat("e3m4")],
    [BlockScaled("e2m1"), BlockScaled("e2m3"), BlockScaled("int8")],
    [BlockScaled("int4", 16, "e4m3"), BlockScaled("int8", 16, "e4m3")],
    *([replace(format, levels=(level,)) for level in format.levels] for format in (*INTEGERS, Codebook((3, 4, 5, 6)))),
]
SCALE_BITS = {"half": 16, "float": 32, "e8m0": 8, "e4m3": 8, "double": 8}


def test_every_registered_format_has_a_case() -> None:
    assert set(Step.registry["format"]) == {type(case).name for case in CASES}


@pytest.mark.parametrize("format", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(format: Format, shape: tuple[int, int]) -> None:
    weight, stats = weight_and_stats(*shape)
    before = weight.clone()
    grid = format.fit(weight, stats)
    codes = grid.quantize(weight)
    top = grid.dequantize(codes, grid.bits)
    assert torch.equal(weight, before), "a step does not change its input"
    assert grid.levels == format.levels
    assert codes.shape == weight.shape and codes.dtype == torch.uint8 and int(codes.max()) < 2**grid.bits
    assert torch.equal(grid.dequantize(grid.quantize(top), grid.bits), top), "re-quantizing is the identity"
    assert torch.equal(grid.dequantize(codes[:, 5:9], grid.bits, first=5), top[:, 5:9]), "columns decode on their own"
    assert torch.equal(grid.quantize(weight[:, 5:9], first=5), codes[:, 5:9]), "and are quantized on their own"
    assert torch.equal(format.fit(weight, stats).quantize(weight), codes), "same input, same codes"
    term = grid.term(codes)
    for level in range(format.levels[0], grid.bits + 1):
        assert torch.isfinite(grid.dequantize(codes, level)).all()
        assert torch.equal(term.dense(level), grid.dequantize(codes, level))


@pytest.mark.parametrize("format", CASES, ids=str)
def test_the_nearest_number_is_chosen(format: Format) -> None:
    """Against every code of every weight tried."""
    weight, stats = weight_and_stats(7, 65)
    grid = format.fit(weight, stats)
    every = torch.stack([grid.dequantize(torch.full((7, 65), c).byte(), grid.bits) for c in range(2**grid.bits)])
    nearest = (every - weight).abs().amin(0)
    chosen = (grid.dequantize(grid.quantize(weight), grid.bits) - weight).abs()
    torch.testing.assert_close(chosen, nearest, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0].name)
def test_the_error_falls_as_bits_rise(family: list[Format]) -> None:
    weight, stats = weight_and_stats()
    errors = []
    for format in family:
        grid = format.fit(weight, stats)
        errors.append(float((weight - grid.dequantize(grid.quantize(weight), grid.bits)).square().mean()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("format", CASES, ids=str)
def test_weights_that_are_zero_constant_or_one_spike(format: Format) -> None:
    weight, stats = weight_and_stats(8, 96)
    weight[0], weight[1], weight[2] = 0.0, 0.25, 0.0
    weight[2, 7] = 3.0
    grid = format.fit(weight, stats)
    values = grid.dequantize(grid.quantize(weight), grid.bits)
    assert torch.isfinite(values).all()
    assert float(values[0].abs().max()) < 0.01
    assert float((values[1] - 0.25).abs().max()) < 0.13 and abs(float(values[2, 7]) - 3) < 1.5


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_bits_are_counted_exactly(format: Integer) -> None:
    weight, stats = weight_and_stats(20, 200)
    grid = format.fit(weight, stats)
    groups = -(-200 // (200 if format.group_size == -1 else format.group_size))
    row = {"half": 16 * groups, "int6": 24 * -(-groups // 4) + 24 * -(-groups // 16), "e4m3-row": 8 * groups + 8}
    scales = row[format.scales] * (1 if format.symmetric else 2)
    for level in range(1, grid.bits + 1):
        assert Codes(grid.quantize(weight), grid).num_bits(level) == 20 * 200 * level + 20 * scales
    assert format.overhead(200) == scales
    for level in format.levels:
        assert sum(8 * array.nbytes for array in grid.arrays(level).values()) == 20 * scales


@pytest.mark.parametrize("format", TABLES, ids=str)
def test_bits_of_tables_are_counted_exactly(format: Format) -> None:
    """Codes, scales and what scales share, each as it is stored."""
    weight, stats = weight_and_stats(24, 200)
    term = format.fit(weight, stats).term(format.fit(weight, stats).quantize(weight))
    size = getattr(format, "group_size", getattr(format, "block_size", -1))
    groups = -(-200 // (200 if size == -1 else size))
    store = getattr(format, "scales", "")
    for level in format.levels:
        expected = 24 * 200 * level
        if isinstance(format, Codebook):
            expected += 24 * 16 * 2**level
        elif store == "int6":
            expected += 24 * (24 * -(-groups // 4) + 24 * -(-groups // 16))
        else:
            expected += 24 * groups * SCALE_BITS[store]
            expected += {"e4m3": 32, "double": 32 + 32 * -(-24 * groups // 256)}.get(store, 0)
        assert term.num_bits(level) == expected
    planned = 200 * format.levels[-1] + format.overhead(200)
    assert term.num_bits(format.levels[-1]) / 24 == pytest.approx(planned, abs=3)


@pytest.mark.parametrize("format", TABLES, ids=str)
def test_terms_come_back_from_their_arrays(format: Format) -> None:
    """All of them, and the lower levels from the lower planes alone."""
    weight, stats = weight_and_stats(9, 100)
    grid = format.fit(weight, stats)
    term = grid.term(grid.quantize(weight))
    assert isinstance(term, SideTerm)
    for planes in format.levels:
        there = {name: kept.array for name, kept in term.kept().items() if kept.plane <= planes}
        again = type(term).restore(there, json.loads(json.dumps(term.facts())))
        for level in range(format.levels[0], planes + 1):
            assert torch.equal(again.dense(level), term.dense(level))


@pytest.mark.parametrize("format", CASES, ids=str)
def test_round_trip_as_data(format: Format) -> None:
    assert step_from_dict("format", json.loads(json.dumps(format.to_dict()))) == format


def test_three_bits_cost_three_and_a_half_at_group_size_64() -> None:
    weight, stats = weight_and_stats(32, 128)
    for size, cost in ((64, 3.5), (128, 3.25)):
        grid = Integer((3,), size).fit(weight, stats)
        assert Codes(grid.quantize(weight), grid).num_bits(3) / weight.numel() == cost


@pytest.mark.parametrize("format", INTEGERS, ids=str)
def test_scales_are_what_half_precision_stores(format: Integer) -> None:
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


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Minifloat("e9m3"), "values: 'e9m3' is unknown; known: nf4, fp4, int2 to int8, eXmY"),
        (lambda: Minifloat("e2m1", 4), "minifloat: group_size=4 must be 8 to 256, or -1"),
        (lambda: Minifloat("e2m1", 32, "half-a-byte"), "scales='half-a-byte' is unknown; known: double, e4m3"),
        (lambda: BlockScaled("e2m1", 512), "block-scaled: block_size=512 must be 8 to 256; MX has 32, NV 16"),
        (lambda: NormalFloat("e2m1"), "normal-float: number='e2m1' is neither nf4 nor fp4"),
        (lambda: NormalFloat("nf4", 4), "normal-float: group_size=4 must be 8 to 4096, or -1"),
        (lambda: Codebook((2, 4)), r"codebook: levels=\(2, 4\) must be neighbours between 1 and 8, such as 2,3,4"),
        (lambda: Codebook(()), r"codebook: levels=\(\) must be neighbours"),
        (lambda: Codebook((8, 9)), r"codebook: levels=\(8, 9\) must be neighbours"),
        (lambda: Codebook((2, 3), 0), "codebook: sweeps=0 must be at least 1"),
    ],
)
def test_bad_parameters_of_tables_are_refused(make: Callable[[], Format], sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        make()
