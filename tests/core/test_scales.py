"""Scales and zero points of nested codes as they are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastiq.core import MIN_SCALE, ElastiqError, Grid, decode_level, encode_level, level_specs, storage, to_half
from elastiq.formats import Integer

STORES = ["half", "int6", "e4m3-row"]


@pytest.mark.parametrize("store", STORES)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), groups=st.integers(1, 40), size=st.integers(-22, 12),
    spread=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 6.0]), level=st.integers(1, 8), symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 1e-3, 0.02, 0.3, 1.0, 30.0]),
)  # fmt: skip
def test_what_is_read_and_stored_again_stays(
    store: str, seed: int, rows: int, groups: int, size: int, spread: float, level: int, symmetric: bool, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = to_half(2.0**size * torch.exp(spread * torch.randn(rows, groups, generator=generator))).clamp_min(MIN_SCALE)
    off = shift * torch.randn(rows, groups, generator=generator)
    zero = None if symmetric else to_half((2**level - 1) / 2 * (1 + off))
    arrays = encode_level(store, level, scale, zero)
    assert {n: (a.dtype, tuple(a.shape)) for n, a in arrays.items()} == level_specs(
        store, level, (rows, groups), symmetric
    )
    assert 8 * sum(a.nbytes for a in arrays.values()) == rows * (2 - symmetric) * storage(store).row_bits(groups)
    read = decode_level(store, level, arrays, groups, symmetric)
    assert read[0].dtype == torch.float16 and float(read[0].min()) >= MIN_SCALE and (read[1] is None) == symmetric
    for row in range(rows):  # each row by itself
        alone = decode_level(store, level, {n: a[row : row + 1] for n, a in arrays.items()}, groups, symmetric)
        assert all(x is None or torch.equal(x[0], y[row]) for x, y in zip(alone, read, strict=True) if y is not None)
    again = encode_level(store, level, *(None if x is None else x.float() for x in read))
    twice = decode_level(store, level, again, groups, symmetric)
    assert all(torch.equal(x, y) for x, y in zip(read, twice, strict=True) if x is not None and y is not None)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("level", [1, 2, 4, 8])
def test_every_number_of_half_precision(store: str, level: int) -> None:
    """Each alone in its row, and each with a neighbour a little off: read and stored again it stays."""
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    for factor in (1.0, 1 + 2.0**-10, 1.01, 1.3):
        scale = torch.stack([every, to_half(every * factor)], 1)
        zero = torch.stack([(2**level - 1) / 2 + every, to_half((2**level - 1) / 2 - every * factor)], 1)
        zero = to_half(zero.clamp(-4096, 4096))
        read = decode_level(store, level, encode_level(store, level, scale, zero), 2, False)
        stored = encode_level(store, level, *(x.float() for x in read if x is not None))
        again = decode_level(store, level, stored, 2, False)
        assert all(torch.equal(x, y) for x, y in zip(read, again, strict=True) if x is not None and y is not None)


@pytest.mark.parametrize(("store", "part"), [("int6", 1 / 63), ("e4m3-row", 2**-4)])
def test_how_far_they_may_be_off(store: str, part: float) -> None:
    """Second level: the range of sixteen neighbours over 63, as a step is at most twice that; floats: three bits."""
    scale = 0.01 * (1 + torch.rand(50, 37, generator=torch.Generator().manual_seed(0)))
    read, _ = decode_level(store, 2, encode_level(store, 2, to_half(scale), None), 37, True)
    assert float((read.float() - scale).abs().max()) <= (0.01 * part if store == "int6" else 0.02 * part)


def test_of_experts_each_row_is_stored_by_itself() -> None:
    scale = to_half(0.01 + torch.rand(3, 4, 20))
    arrays = encode_level("int6", 3, scale, scale)
    assert all(array.shape[:2] == (3, 4) for array in arrays.values())
    for expert in range(3):
        alone = encode_level("int6", 3, scale[expert], scale[expert])
        assert all(torch.equal(arrays[name][expert], array) for name, array in alone.items())
    assert decode_level("int6", 3, arrays, 20, False)[0].shape == (3, 4, 20)


def test_a_grid_as_it_is_read() -> None:
    scale, zero = (to_half(torch.rand(2, 6, 9) + 0.1) for _ in range(2))
    grid = Grid((2, 4), 16, scale, zero)
    stored = grid.stored("int6")
    assert stored.scales == "int6" and not torch.equal(stored.scale, scale) and torch.equal(grid.scale, scale)
    again = stored.stored("int6")
    assert torch.equal(again.scale, stored.scale) and torch.equal(again.zero_point, stored.zero_point)


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [("e4m3", "does not store each row by itself; use half or int6"), ("int9", "scales='int9' is unknown; known: ")],
)
def test_other_ways_are_refused(scales: str, sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        Integer(scales=scales)


def test_a_range_that_rounding_makes_longer_takes_the_next_power() -> None:
    """From 0.5 to 63.5 in ones: 64 steps once both ends are rounded, which 6 bits do not hold, so steps of two."""
    scale = torch.linspace(0.5, 63.5, 16)[None] / 1024
    arrays = encode_level("int6", 4, scale, None)
    read = decode_level("int6", 4, arrays, 16, True)[0].float()
    assert float((read - scale).abs().max()) <= 1 / 1024
    assert arrays["scale_4_step"].tolist() == [[-9]]
