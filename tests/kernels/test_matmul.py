"""Products on bit planes: every path of this machine against double precision and against the readable twin."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import random_weight
from torch import Tensor

import elastiq.kernels.matmul as kernels
from elastiq.core import Codes, ElastiqError, QuantizedWeight
from elastiq.kernels.matmul import (
    TiledWeight,
    cpu,
    decode,
    matmul,
    reference,
    tile_plane,
    tile_scale,
    untile_plane,
    untile_scale,
)
from elastiq.linalg import native, pack_planes

COMPILED = [path for path in native.paths() if path != "torch"]
ERROR = {"int16": 1e-4, "int8": 2.5e-2, "float": 5e-6}
"""Relative error of a mode's outputs, activations without outliers."""


@pytest.fixture(params=native.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use(None)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiled(weight: QuantizedWeight, bits: int) -> TiledWeight:
    (term,) = weight.terms
    assert isinstance(term, Codes)
    grid = term.grid
    level = max((own for own in grid.levels if own <= bits), default=grid.levels[0])
    at = grid.levels.index(level)
    planes = pack_planes(term.codes, grid.bits)[:bits]
    zero_point = None if grid.symmetric else tile_scale(grid.zero_point[at].half())
    return TiledWeight(
        [tile_plane(plane) for plane in planes], tile_scale(grid.scale[at].half()), zero_point, level,
        *term.codes.shape, grid.group_size,
    )  # fmt: skip


def activations_of(tokens: int, width: int, seed: int = 0, outliers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    if outliers:
        x *= 1 + 20 * (torch.rand(width, generator=generator) < 0.05)
    return x


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 100)), experts=st.integers(0, 2), bits=st.integers(1, 8),
    seed=st.integers(0, 99), path=st.sampled_from(native.paths()),
)  # fmt: skip
def test_tile_order_and_back(shape: tuple[int, int], experts: int, bits: int, seed: int, path: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()
    codes = torch.randint(0, 2**bits, (*lead, *shape), generator=generator, dtype=torch.uint8)
    scale = torch.randn(*lead, shape[0], 3, generator=generator).half()
    native.use(path)
    try:
        for plane in pack_planes(codes, bits):
            assert torch.equal(untile_plane(tile_plane(plane), *shape), plane)
        tiles = tile_scale(scale)
    finally:
        native.use(None)
    assert torch.equal(untile_scale(tiles, shape[0]), scale)
    assert not tiles.transpose(-1, -2).flatten(-3, -2)[..., shape[0] :, :].any()


def test_a_bit_lies_where_the_layout_says() -> None:
    rows, inputs = 20, 70
    for row, column in ((0, 0), (17, 69), (5, 37), (15, 31), (16, 32)):
        codes = torch.zeros(rows, inputs, dtype=torch.uint8)
        codes[row, column] = 1
        lines = tile_plane(pack_planes(codes, 1)[0])
        byte, bit = column % 4, column % 32 // 4
        assert int(lines[row // 16, column // 32, row % 16, byte]) == 1 << bit
        assert int(lines.sum(dtype=torch.int64)) == 1 << bit


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("shape", "group_size"), [((48, 128), 32), ((33, 256), 64), ((16, 384), 128), ((50, 100), 100), ((7, 640), 320)]
)
def test_against_double_precision(path: str, bits: int, shape: tuple[int, int], group_size: int) -> None:
    weight = random_weight(shape, group_size=group_size, symmetric=bits % 3 == 0, seed=bits)
    dense = weight.dequantize(bits).double()
    tiles = tiled(weight, bits)
    assert torch.equal(decode(tiles).double(), dense)
    bias = torch.randn(shape[0])
    for tokens in (1, 2, 7, 13):
        for mode, error in ERROR.items():
            for outliers in (False, True):
                x = activations_of(tokens, shape[1], bits, outliers)
                result = matmul(x, tiles, bias, mode)
                assert relative(result - bias, x.double() @ dense.T) < error * (2 if outliers else 1)


@pytest.mark.parametrize("tokens", [1, 3, 17, 32, 33, 64, 130, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "group_size"), [(192, 64), (160, 160)])
def test_any_number_of_tokens_in_any_type(
    path: str, tokens: int, dtype: torch.dtype, width: int, group_size: int
) -> None:
    weight = random_weight((40, width), group_size=group_size)
    tiles = tiled(weight, 5)
    x = activations_of(tokens, width).to(dtype)
    bias = torch.randn(40).to(dtype)
    expected = x.double() @ weight.dequantize(5).double().T + bias.double()
    result = matmul(x.view(1, tokens, width), tiles, bias)
    assert result.dtype == dtype and result.shape == (1, tokens, 40)
    assert relative(result[0], expected) < {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("group_size", [1, 5, 16, 48, 96])
def test_groups_that_tiles_do_not_fit(path: str, group_size: int) -> None:
    weight = random_weight((19, 96), group_size=group_size)
    tiles, x = tiled(weight, 3), activations_of(3, 96)
    assert torch.equal(decode(tiles), weight.dequantize(3))
    assert relative(matmul(x, tiles), x.double() @ weight.dequantize(3).double().T) < 1e-4


def test_long_groups_do_not_overflow(path: str) -> None:
    """The largest codes against activations that all have the largest size."""
    weight = random_weight((16, 4096), group_size=4096)
    (term,) = weight.terms
    assert isinstance(term, Codes)
    term.codes.fill_(255)
    x = torch.full((9, 4096), -3.0)
    expected = x.double() @ weight.dequantize(8).double().T
    for mode in ERROR:
        assert relative(matmul(x[:1], tiled(weight, 8), None, mode), expected[:1]) < 1e-5
    assert relative(matmul(x, tiled(weight, 8)), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_equals_the_twin(path: str, dtype: torch.dtype) -> None:
    weight = random_weight((37, 75), group_size=25)
    rows = torch.tensor([36, 0, 17, 17, 5])
    for bits in range(1, 9):
        tiles = tiled(weight, bits)
        assert torch.equal(decode(tiles, None, dtype), reference.decode(tiles).to(dtype))
        assert torch.equal(decode(tiles, rows, dtype), weight.dequantize(bits)[rows].to(dtype))
    with pytest.raises(IndexError):
        decode(tiles, torch.tensor([37]))


@pytest.mark.parametrize("mode", ERROR)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_strange_activations_never_vanish(path: str, mode: str, bad: float) -> None:
    weight = tiled(random_weight((20, 128)), 4)
    for tokens in (3, 40):
        x = activations_of(tokens, 128)
        x[1, 70] = bad
        result = matmul(x, weight, None, mode)
        assert not result[1].isfinite().any()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("mode", ERROR)
def test_padding_is_never_read(path: str, mode: str) -> None:
    """Rows and inputs that only fill a tile may hold anything; memory of the results is written in full."""
    weight = random_weight((18, 72), group_size=72)
    clean = tiled(weight, 4)
    x = activations_of(3, 72)
    dirty = TiledWeight(
        [plane.clone() for plane in clean.planes], clean.scale.clone(), clean.zero_point, 4, 18, 72, 72
    )
    for plane in dirty.planes:
        plane[1, :, 2:] = 0xFF  # rows beyond 18
        plane[:, 2, :, :] |= 0xFC  # inputs beyond 72
    dirty.scale[1, :, 2:] = float("nan")
    assert torch.equal(matmul(x, dirty, None, mode), matmul(x, clean, None, mode))
    assert torch.equal(decode(dirty), decode(clean))


def before_a_wall(array: Tensor) -> Tensor:
    """A copy that ends where memory begins that nobody may touch; sanitizers do not see masked and tile loads."""
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=array.dtype, count=array.numel(), offset=room - array.nbytes)
    return copy.view(array.shape).copy_(array)


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory by a call of Linux")
@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beyond_the_arrays_is_touched(path: str, dtype: torch.dtype) -> None:
    for shape, group_size in (((18, 72), 72), ((33, 96), 32), ((18, 256), 128)):
        for bits in (1, 3, 8):
            planes, scale, zero_point, *rest = tiled(random_weight(shape, group_size=group_size), bits)
            arrays = [before_a_wall(array) for array in (*planes, scale, zero_point)]
            weight = TiledWeight(arrays[:bits], arrays[bits], arrays[bits + 1], *rest)
            bias = before_a_wall(torch.randn(shape[0]).to(dtype))
            for tokens in (1, 2, 7, 20, 50):
                x = before_a_wall(activations_of(tokens, shape[1]).to(dtype))
                for mode in ERROR:
                    assert cpu.matmul(path, x, weight, bias, mode).isfinite().all()


def test_zeros_and_extremes(path: str) -> None:
    tiles = tiled(random_weight((20, 128)), 4)
    assert torch.equal(matmul(torch.zeros(2, 128), tiles), torch.zeros(2, 20))
    assert matmul(torch.zeros(0, 128), tiles).shape == (0, 20)
    for size in (1e-25, 1e30):
        x = size * activations_of(2, 128)
        assert relative(matmul(x, tiles), x.double() @ decode(tiles).double().T) < 1e-4


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_threads_change_no_bit(path: str, tokens: int, threads: None) -> None:
    native.use(path)
    try:
        for bits in (1, 2, 3, 8):
            tiles = tiled(random_weight((333, 256), group_size=128 if bits == 3 else 64), bits)
            x = activations_of(tokens, 256)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append([matmul(x, tiles, None, mode) for mode in ("int16", "int8")])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        native.use(None)


@pytest.mark.skipif(not COMPILED, reason="needs the compiled module")
def test_what_does_not_fit_is_refused() -> None:
    tiles, x, path = tiled(random_weight((20, 128)), 4), activations_of(2, 128), COMPILED[0]

    def altered(**fields: object) -> TiledWeight:
        return tiles._replace(**fields)

    with pytest.raises(ElastiqError, match=r"a plane is torch\.uint8 \[1, 4, 16, 4\], not 512 contiguous bytes"):
        cpu.matmul(path, x, altered(planes=[plane[:1] for plane in tiles.planes]))
    with pytest.raises(ElastiqError, match=r"a plane is torch\.int8"):
        cpu.decode(path, altered(planes=[plane.view(torch.int8) for plane in tiles.planes]))
    with pytest.raises(ElastiqError, match=r"a scale is torch\.float32"):
        cpu.matmul(path, x, altered(scale=tiles.scale.float()))
    with pytest.raises(ElastiqError, match=r"a scale is torch\.float16"):
        cpu.decode(path, altered(zero_point=tiles.zero_point[:, :1]))
    with pytest.raises(ElastiqError, match="0 planes"):
        cpu.matmul(path, x, altered(planes=[]))
    with pytest.raises(ElastiqError, match=r"x is torch\.float32 \[2, 127\]; 128 inputs"):
        cpu.matmul(path, x[:, :127], tiles)
    with pytest.raises(ElastiqError, match="a bias has 19 numbers, the matrix 20 rows"):
        cpu.matmul(path, x, tiles, torch.zeros(19))
    with pytest.raises(ElastiqError, match="activations are int16, int8, float, not 'int4'"):
        cpu.matmul(path, x, tiles, None, "int4")
    memory = torch.zeros(513 + 64, dtype=torch.uint8)
    start = 1 - memory.data_ptr() % 64 + 64 * (memory.data_ptr() % 64 > 1)
    with pytest.raises(ValueError, match="planes must begin at a multiple of 64 bytes"):
        cpu.matmul(path, x, altered(planes=[memory[start : start + 512]]))


def test_an_operation_of_torch(path: str) -> None:
    weight = tiled(random_weight((20, 128)), 4)
    x = activations_of(3, 128)
    checks = ("test_schema", "test_faketensor")
    product, values = torch.ops.elastiq.matmul.default, torch.ops.elastiq.decode.default
    torch.library.opcheck(product, (x, *weight[:3], None, *weight[3:], "int16"), test_utils=checks)
    torch.library.opcheck(values, (*weight[:3], torch.tensor([3]), *weight[3:], torch.float32), test_utils=checks)
    assert torch.equal(product(x, *weight[:3], None, *weight[3:], "int16"), matmul(x, weight))


def test_operations_notice_what_changes(path: str) -> None:
    """What an operation keeps of a matrix it was given never outlives the arrays, and follows where they lie."""
    product, x = torch.ops.elastiq.matmul.default, activations_of(3, 128)
    first, second = (tiled(random_weight((20, 128), seed=seed), 4) for seed in (0, 1))

    def reads(weight: TiledWeight) -> bool:
        return torch.equal(product(x, *weight[:3], None, *weight[3:], "int16"), matmul(x, weight))

    assert reads(first) and reads(first)
    assert reads(first._replace(scale=second.scale)) and reads(first._replace(planes=first.planes[:3]))
    first.planes[0].copy_(second.planes[0])
    assert reads(TiledWeight(*first))
    first.planes[1].data = second.planes[1].clone()
    assert reads(TiledWeight(*first))
    plane = weakref.ref(first.planes[0])
    keys = {id(weight.planes[0]) for weight in (first, second)}
    del first, second
    gc.collect()
    assert plane() is None and not keys & kernels._seen.keys()
