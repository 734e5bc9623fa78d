"""Blocks of GGUF, read back by the package that defines them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elastiq.foreign.gguf.blocks import BLOCK_TYPES, encode

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


def decode(kind: str, data: Tensor) -> Tensor:
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def weights(rows: int = 12, columns: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(rows, 1, generator=generator) + 0.01
    return size * torch.randn(rows, columns, generator=generator) ** 3


def error(wanted: Tensor, held: Tensor) -> float:
    return float((held - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_size_is_that_of_the_package(kind: str) -> None:
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert (BLOCK_TYPES[kind].block, BLOCK_TYPES[kind].num_bytes) == (block, num_bytes)
    assert encode(BLOCK_TYPES[kind], weights()).shape == (12, 512 // block * num_bytes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_not_worse_than_the_package_rounds(kind: str) -> None:
    x = weights()
    reference = gguf.dequantize(
        gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind]
    )
    assert error(x, decode(kind, encode(BLOCK_TYPES[kind], x))) <= error(x, torch.from_numpy(reference))


@pytest.mark.parametrize(
    ("kind", "most"), [("Q2_K", 0.12), ("Q3_K", 0.04), ("Q4_K", 0.01), ("Q5_K", 0.0025), ("Q6_K", 0.0007)]
)
def test_k_types_hold_heavy_tails(kind: str, most: float) -> None:
    """Of a cubed normal, whose squares a plain rounding of its extremes would lose at two bits."""
    x = weights()
    assert error(x, decode(kind, encode(BLOCK_TYPES[kind], x))) < most


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_rows_and_blocks_are_independent(kind: str) -> None:
    x = weights()
    data = encode(BLOCK_TYPES[kind], x)
    size = BLOCK_TYPES[kind].block
    assert torch.equal(encode(BLOCK_TYPES[kind], x[3:5, size : 2 * size].contiguous()),
                       data.reshape(12, -1, BLOCK_TYPES[kind].num_bytes)[3:5, 1])  # fmt: skip


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 3e-8, 6e4])
def test_constant_rows(kind: str, value: float) -> None:
    x = torch.full((2, 256), value)
    held = decode(kind, encode(BLOCK_TYPES[kind], x))
    assert torch.isfinite(held).all()
    assert (held - x).abs().max() <= 0.04 * abs(value) + 6e-8


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_again_changes_little(kind: str) -> None:
    held = decode(kind, encode(BLOCK_TYPES[kind], weights()))
    again = decode(kind, encode(BLOCK_TYPES[kind], held))
    assert error(held, again) < 0.05 * error(weights(), held)


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"])
def test_codes_on_a_known_grid_stay(kind: str) -> None:
    """Half-precision scales hold a grid to rounding; K types hold it to the steps of their integer scales."""
    shape = BLOCK_TYPES[kind]
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**shape.bits, (8, 512), generator=generator)
    scale = (0.01 * (1 + 0.2 * torch.rand(8, 512 // 64, generator=generator))).half().float()
    zero = 2.0 ** (shape.bits - 1) + torch.rand(8, 512 // 64, generator=generator)
    per_run = (64 // shape.run,)
    scale, offset = scale.repeat_interleave(*per_run, 1), (-scale * zero).repeat_interleave(*per_run, 1)
    x = codes * scale.repeat_interleave(shape.run, 1) + offset.repeat_interleave(shape.run, 1)
    held = decode(kind, encode(shape, x, scale, offset))
    assert error(x, held) < (1e-6 if not shape.scale_bits else {2: 4e-3, 4: 5e-4, 5: 5e-4}[shape.bits])
