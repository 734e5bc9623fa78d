"""Bit planes: packing and back, against numpy's own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastiq.core import ElastiqError
from elastiq.linalg import pack_planes, unpack_planes


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_the_first_planes_are_the_top_bits(bits: int, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, generator=generator)
    planes = pack_planes(codes, bits)
    assert len(planes) == bits and all(p.shape == (rows, -(-width // 8)) for p in planes)
    for level in range(1, bits + 1):
        assert torch.equal(unpack_planes(planes[:level], width), codes >> (bits - level))
    expected = np.packbits((codes.numpy() >> (bits - 1)) & 1, axis=-1, bitorder="little")
    assert np.array_equal(planes[0].numpy(), expected)


def test_a_leading_expert_axis() -> None:
    codes = torch.randint(0, 16, (3, 5, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_planes(pack_planes(codes, 4), 20), codes)


def test_other_types_are_refused() -> None:
    with pytest.raises(ElastiqError, match=r"planes: codes must be uint8, not torch\.int64"):
        pack_planes(torch.ones(2, 8, dtype=torch.int64), 4)
