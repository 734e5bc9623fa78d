"""Formats bit for bit against the types, definitions and programs they are named after."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from contracts.data import weight_and_stats
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import formats as naive
from torch import Tensor

from elastiq import recipes
from elastiq.core import Format, rounded
from elastiq.formats import BlockScaled, Codebook, Minifloat, NormalFloat
from elastiq.parts import values
from elastiq.parts.table import TableGrid

ml_dtypes = pytest.importorskip("ml_dtypes")
TYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2ieee": ml_dtypes.float8_e5m2,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def unscaled(name: str, columns: int) -> TableGrid:
    return TableGrid((len(values(name)).bit_length() - 1,), columns, (1, columns), (name,))


def finite_top(name: str) -> float:
    return float(values(name).max())


@pytest.mark.parametrize("name", TYPES)
def test_every_code_stands_for_the_number_of_the_type(name: str) -> None:
    codes = np.arange(len(values(name)), dtype=np.uint8)
    theirs = torch.from_numpy(codes.view(TYPES[name]).astype(np.float32))
    finite = torch.isfinite(theirs)
    assert torch.equal(values(name)[finite], theirs[finite])
    assert bool((values(name)[~finite].abs() == finite_top(name)).all())


@pytest.mark.parametrize(("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2ieee", torch.float8_e5m2)])
def test_codes_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """Every number of the type, every middle between two, and random ones."""
    numbers = values(name).unique()
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.randn(4000) * finite_top(name) / 3])
    x = x.clamp(-finite_top(name), finite_top(name))[None]
    got = unscaled(name, x.shape[1]).quantize(x)
    expected = x.to(dtype)
    assert torch.equal(values(name)[got.long()], expected.float())
    same = expected.float() != 0  # of two zeros the positive one is taken
    assert torch.equal(got[same], expected.view(torch.uint8)[same])


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(-10, 0))
def test_rounding_is_that_of_the_type(name: str, numbers: list[float], exponent: int) -> None:
    x = torch.tensor(numbers)[None] * finite_top(name) * 2.0**exponent
    got = values(name)[unscaled(name, x.shape[1]).quantize(x).long()]
    assert torch.equal(got, torch.from_numpy(x.numpy().astype(TYPES[name]).astype(np.float32)))


def blocks(rows: int = 12, columns: int = 96) -> Tensor:
    """Heavy-tailed weights with blocks of zeros, of powers of two, and of very small and very large numbers."""
    weight, _ = weight_and_stats(rows, columns)
    weight[0] = 0.0
    weight[1] = 2.0 ** torch.arange(-24, columns - 24).clamp_max(10).float()
    weight[2] *= 1e-30
    weight[3] *= 1e6
    weight[4, :32] = 0.0
    return weight


def decoded(format: Format, weight: Tensor) -> Tensor:
    grid = format.fit(weight, weight_and_stats()[1])
    return grid.dequantize(grid.quantize(weight), grid.bits)


@pytest.mark.parametrize("number", ["e4m3fn", "e5m2ieee", "e2m3", "e3m2", "e2m1", "int8"])
def test_mx_blocks_are_those_of_the_definition(number: str) -> None:
    """OCP Microscaling Formats v1.0, section 6.3, written out number by number in tests/naive/formats.py."""
    weight = blocks()
    element = TYPES.get(number)
    expected = naive.mx(weight.numpy(), 32, element, finite_top(number))
    assert np.array_equal(decoded(BlockScaled(number), weight).numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_mx_integers_of_the_study_do_not_saturate(bits: int) -> None:
    """INT v.s. FP rounds the shared exponent up: no element is cut off. So does the recipe of MXINT4."""
    assert [recipes.mx(n).format for n in ("int4", "int8")] == [BlockScaled("int4", round_up=True), BlockScaled("int8")]
    weight = blocks()
    error = (decoded(BlockScaled(f"int{bits}", round_up=True), weight) - weight).abs()
    top = weight.view(12, 3, 32).abs().amax(-1).clamp_min(2.0**-126)
    step = torch.exp2(torch.log2(top / (2 ** (bits - 1) - 1)).ceil())
    assert bool((error.view(12, 3, 32) <= step[..., None] / 2 + 1e-45).all())


@pytest.mark.parametrize("number", ["e2m1", "int4"])
def test_nv_blocks_are_those_of_the_definition(number: str) -> None:
    weight = blocks()
    expected = naive.nv(weight.numpy(), 16, TYPES.get(number), finite_top(number))
    np.testing.assert_allclose(decoded(BlockScaled(number, 16, "e4m3"), weight).numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("number", ["nf4", "fp4"])
@pytest.mark.parametrize("scales", ["float", "double"])
def test_normal_floats_are_those_of_bitsandbytes(number: str, group_size: int, scales: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, stats = weight_and_stats(96, 256)
    packed, state = functional.quantize_4bit(
        weight, blocksize=group_size, quant_type=number, compress_statistics=scales == "double"
    )
    theirs = functional.dequantize_4bit(packed, state)
    grid = NormalFloat(number, group_size, scales).fit(weight, stats)
    codes = grid.quantize(weight)
    their_codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(96, 256)
    torch.testing.assert_close(grid.dequantize(their_codes, 4), theirs, rtol=3e-7, atol=1e-9)
    differ = values(number)[codes.long()] != values(number)[their_codes.long()]
    if scales == "float":
        assert not differ.any()
    else:  # they choose codes before they round the scales, we after
        assert float(differ.float().mean()) < 0.02
        ours, their_error = ((x - weight).abs() for x in (grid.dequantize(codes, 4), theirs))
        assert bool((ours <= their_error + 1e-9).all())


def test_fp8_by_rows_is_a_cast_by_torch() -> None:
    weight, _ = weight_and_stats(40, 96)
    scale = (weight.abs().amax(1, keepdim=True) / 448).half().float()
    expected = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(decoded(Minifloat("e4m3fn", clip=False), weight), expected)


@pytest.mark.parametrize("store", ["half", "float", "e8m0", "e4m3", "e4m3-row", "int6", "double"])
@pytest.mark.parametrize("groups", [1, 9, 16, 40])
def test_scales_come_back_near_what_they_were(store: str, groups: int) -> None:
    scale = 0.01 * (1 + torch.rand(24, groups, generator=torch.Generator().manual_seed(0)))
    steps = {"half": 2**-11, "float": 0, "e8m0": 0.5, "e4m3": 2**-4, "e4m3-row": 2**-4, "int6": 0.02, "double": 0.04}
    step = steps[store]
    again = rounded(store, scale)
    assert again.shape == scale.shape
    assert float(((again - scale).abs() / scale).max()) <= step
    torch.testing.assert_close(rounded(store, again), again, rtol=2e-2 if store == "double" else 1e-3, atol=0.0)


@pytest.mark.parametrize("gradients", [False, True])
def test_clusters_split_where_their_naive_twin_splits_them(gradients: bool) -> None:
    """Three levels of a codebook: every number of a level, against all cuts of all clusters tried; weights count by
    their squared gradients where these are known."""
    weight, stats = weight_and_stats(6, 90)
    shares = stats.mean_diagonal(90).expand(6, 90)
    stats.sums["grad_sq"] = torch.zeros(0, 90)
    if gradients:
        shares = stats.sums["grad_sq"] = torch.rand(6, 90, generator=torch.Generator().manual_seed(3)) ** 4 + 0.01
    grid = Codebook((2, 3, 4)).fit(weight, stats)
    for row in range(6):
        (x, order), share = weight[row].sort(), shares[row]
        lowest = grid.tables[2][row].float()
        inner = torch.searchsorted(x, ((lowest[1:] + lowest[:-1]) / 2).contiguous())
        edges = [0, *inner.tolist(), 90]
        for level in (3, 4):
            edges = naive.split_clusters(x.numpy(), share[order].numpy(), edges)
            mass = share[order].double()
            for k, (first, last) in enumerate(pairwise(edges)):
                if last > first:
                    part = mass[first:last]
                    mean = float((x[first:last].double() * part).sum() / part.sum())
                    assert float(grid.tables[level][row, k]) == pytest.approx(mean, rel=2e-3, abs=1e-5)
