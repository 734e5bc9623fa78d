"""Modules over packed planes, alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import LEVELS, random_weight
from torch import nn
from torch.nn import functional as F

from elastiq.core import Codes, ElastiqError, QuantizedWeight
from elastiq.linalg import pack_planes
from elastiq.runtime import (
    NestedEmbedding,
    NestedExperts,
    NestedLinear,
    NestedMatrix,
    StoredMatrix,
    TiedHead,
    bits_per_weight,
    bytes_in_memory,
    swap,
)


def stored_arrays(matrix: StoredMatrix, members: list[QuantizedWeight], plane: int) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold of one plane."""
    arrays: dict[str, list[torch.Tensor]] = {name: [] for name in matrix.arrays(plane)}
    for member in members:
        (term,) = member.terms
        assert isinstance(term, Codes)
        for name in arrays:
            if name.startswith(("scale_", "zero_point_")):
                kind, level = name.rsplit("_", 1)
                arrays[name].append(getattr(term.grid, kind)[term.grid.levels.index(int(level))].half())
            else:
                arrays[name].append(pack_planes(term.codes, term.grid.bits)[plane - 1])
    return {name: torch.stack(parts) if matrix.role == "expert" else parts[0] for name, parts in arrays.items()}


def hold(module: NestedMatrix, members: list[QuantizedWeight], planes: int) -> None:
    for plane in range(1, planes + 1):
        module.hold(stored_arrays(module.stored, members, plane))


def linear(
    shape: tuple[int, int] = (12, 40), planes: int = 8, bias: bool = False
) -> tuple[NestedLinear, QuantizedWeight]:
    weight = random_weight(shape, group_size=16)
    matrix = StoredMatrix("up", "linear", shape, 16, LEVELS)
    module = NestedLinear(matrix, nn.Parameter(torch.randn(shape[0])) if bias else None, torch.float32)
    hold(module, [weight], planes)
    module.bits = planes
    return module, weight


@settings(max_examples=30, deadline=None)
@given(
    levels=st.sets(st.integers(1, 8), min_size=2).map(lambda levels: tuple(sorted(levels))),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    group_size=st.integers(1, 50),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_level_is_that_of_the_term(
    levels: tuple[int, ...], shape: tuple[int, int], group_size: int, symmetric: bool, seed: int
) -> None:
    weight = random_weight(shape, levels, group_size, symmetric, seed)
    module = NestedLinear(StoredMatrix("m", "linear", shape, group_size, levels, symmetric), None, torch.float32)
    hold(module, [weight], levels[-1])
    for bits in range(1, levels[-1] + 1):
        module.bits = bits
        assert torch.equal(module.dense(), weight.dequantize(bits))


def test_linear() -> None:
    module, weight = linear(bias=True)
    assert set(module.state_dict()) == {"bias", "weight"} | {f"plane_{p}" for p in range(2, 9)} | {
        f"{kind}_{level}" for kind in ("scale", "zero_point") for level in LEVELS
    }
    assert module.state_dict()["weight"].dtype == torch.uint8
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight.T, weight.dequantize(8).T)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module.to(dtype)
        x = torch.randn(2, 3, 40).to(dtype)
        for bits in (1, 3, 5, 8):
            module.bits = bits
            expected = F.linear(x, weight.dequantize(bits).to(dtype), module.bias)
            assert module(x).dtype == dtype
            assert torch.equal(module(x), expected)


def test_changing_dtype_leaves_the_grid_alone() -> None:
    module, weight = linear()
    for change in (nn.Module.float, nn.Module.bfloat16, nn.Module.double, nn.Module.half):
        change(module)
        assert module.scale_2.dtype == module.zero_point_8.dtype == torch.float16
        assert module.plane_3.dtype == torch.uint8
        assert torch.equal(module.dense(), weight.dequantize(8))
    assert module.dtype == torch.float16
    assert module.to("meta").scale_2.device.type == "meta"


def test_embedding_reads_only_its_rows() -> None:
    weight = random_weight((30, 24), group_size=16)
    module = NestedEmbedding(StoredMatrix("embed", "embedding", (30, 24), 16, LEVELS), torch.bfloat16)
    hold(module, [weight], 6)
    module.bits = 5
    ids = torch.tensor([[3, 29, 3], [0, 1, 2]])
    assert torch.equal(module(ids), weight.dequantize(5).bfloat16()[ids])
    scaled = NestedEmbedding(module.stored, torch.float32, 8.0)
    hold(scaled, [weight], 2)
    scaled.bits = 2
    assert torch.equal(scaled(ids), 8.0 * weight.dequantize(2)[ids])
    assert module(ids[:, :0]).shape == (2, 0, 24)


def test_experts() -> None:
    weights = [random_weight((8, 20), group_size=16, seed=e) for e in range(3)]
    module = NestedExperts(StoredMatrix("up", "expert", (3, 8, 20), 16, LEVELS), torch.float16)
    hold(module, weights, 8)
    module.bits = 4
    assert len(module) == 3
    for expert in range(3):
        for index in (expert, torch.tensor(expert)):
            assert torch.equal(module[index], weights[expert].dequantize(4).half())


@pytest.mark.parametrize("symmetric", [False, True])
def test_planes_may_be_exchanged_and_moved(symmetric: bool) -> None:
    """What a product keeps of its matrix never outlives the arrays it was made from."""
    stored = StoredMatrix("m", "linear", (48, 128), 32, LEVELS, symmetric)
    (module, first), (other, second) = [
        (NestedLinear(stored, None, torch.float32), random_weight((48, 128), LEVELS, 32, symmetric, seed))
        for seed in (0, 1)
    ]
    for nested, weight in ((module, first), (other, second)):
        hold(nested, [weight], 8)
        nested.bits = 6
    x = torch.randn(3, 128)

    def reads(weight: QuantizedWeight) -> bool:
        expected = F.linear(x, weight.dequantize(6))
        return bool((module(x) - expected).norm() < 1e-3 * expected.norm())

    assert reads(first) and module.tiled() is module.tiled()
    module.load_state_dict(other.state_dict(), assign=True)
    assert reads(second)
    module.load_state_dict({name: array.clone() for name, array in module.state_dict().items()}, assign=True)
    other.get_buffer("plane_2").zero_()
    assert reads(second)
    for name, array in module.named_buffers():
        array.data = array.clone()
        assert reads(second), name
        array.share_memory_()
        assert reads(second), name
    module.plane_2.data = 255 - module.plane_2
    assert not reads(second)


def test_compilers_and_exporters_see_operations_of_torch() -> None:
    def made(shape: tuple[int, int], bias: bool) -> NestedLinear:
        parameter = nn.Parameter(torch.randn(shape[0]), requires_grad=False) if bias else None
        module = NestedLinear(StoredMatrix("m", "linear", shape, 32, LEVELS), parameter, torch.float32)
        hold(module, [random_weight(shape, group_size=32)], 8)
        module.bits = 4
        return module

    model, x = nn.Sequential(made((48, 64), True), nn.SiLU(), made((20, 48), False)), torch.randn(3, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(compiled(x), model(x))
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), model(x))
        calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert calls.count(torch.ops.elastiq.matmul.default) == 2
        before = model(x)
        model[0].bits = 2
        assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), before)


def test_widths_and_planes() -> None:
    module, _ = linear(planes=3)
    assert (module.bits, module.max_bits) == (3, 3)
    assert "bits=3, max_bits=3" in repr(module)
    for bits in (0, 4, 8):
        with pytest.raises(ElastiqError, match=rf"up: {bits} bits were asked for, the planes held give 1, 2, 3; use"):
            module.bits = bits
    assert module.bits == 3
    with pytest.raises(ElastiqError, match="up: plane 4 is"):
        module.hold({"plane_5": torch.zeros(12, 5, dtype=torch.uint8)})
    empty = NestedLinear(module.stored, None, torch.float32)
    with pytest.raises(ElastiqError, match="the planes held give no width yet"):
        empty.bits = 1
    single = NestedLinear(StoredMatrix("m", "linear", (12, 40), 16, (4,)), None, torch.float32)
    hold(single, [random_weight((12, 40), (4,), 16)], 4)
    with pytest.raises(ElastiqError, match="the planes held give 4;"):
        single.bits = 3
    single.bits = 4


def test_counts() -> None:
    """Everything held counts in memory, only what is read counts per weight."""
    module, weight = linear((16, 64), planes=8)
    planes, grids = 16 * 8, 2 * 2 * 16 * 4
    assert bytes_in_memory(module) == 8 * planes + len(LEVELS) * grids
    for bits in range(1, 9):
        module.bits = bits
        assert bits_per_weight(module) == weight.num_bits(bits) / (16 * 64) == bits + 2
        assert module.stored.num_bits(bits) == weight.num_bits(bits)
    with pytest.raises(ElastiqError, match="the model has no quantized matrices"):
        bits_per_weight(nn.Linear(2, 2))
    shared = nn.ModuleList([module, module])
    shared.twice = module.weight
    assert bytes_in_memory(shared) == bytes_in_memory(module)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.head = nn.Linear(24, 30, bias=False)
        self.head.weight = self.embed.weight
        self.up = nn.Linear(24, 24)


def test_swap() -> None:
    model, table = Toy(), random_weight((30, 24), group_size=16)
    swap(model, StoredMatrix("embed", "embedding", (30, 24), 16, LEVELS))
    assert isinstance(model.embed, NestedEmbedding)
    assert isinstance(model.head, TiedHead)
    hold(model.embed, [table], 3)
    model.embed.bits = 3
    x = torch.randn(5, 24)
    assert torch.equal(model.head(x), F.linear(x, table.dequantize(3)))
    assert not [name for name in model.state_dict() if name.startswith("head")]
    twin = copy.deepcopy(model)
    twin.embed.bits = 2
    assert torch.equal(twin.head(x), F.linear(x, table.dequantize(2)))
    assert torch.equal(model.head(x), F.linear(x, table.dequantize(3)))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (
            StoredMatrix("up", "linear", (24, 48), 16, LEVELS),
            r"up: the checkpoint holds \[24, 48\], the model of config",
        ),
        (StoredMatrix("down", "linear", (24, 24), 16, LEVELS), r"down: the model of config\.json has no such matrix"),
        (
            StoredMatrix("up.x", "expert", (2, 24, 24), 16, LEVELS),
            r"up\.x: the model of config\.json has no such matrix",
        ),
        (StoredMatrix("", "linear", (24, 24), 16, LEVELS), r"the model of config\.json has no such matrix"),
    ],
)
def test_swap_refuses(matrix: StoredMatrix, sentence: str) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        swap(Toy(), matrix)


@pytest.mark.parametrize("kept_as", [lambda x: x, torch.tensor], ids=["number", "tensor"])
def test_an_embedding_that_multiplies_its_rows_is_tried(kept_as: Callable[[float], object]) -> None:
    """Whatever the factor's name, and whether it is a number or a tensor."""

    class Scaled(nn.Embedding):
        factor_of_the_family = kept_as(5.5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.factor_of_the_family

    model, table = Toy(), random_weight((30, 24), group_size=16)
    model.embed = Scaled(30, 24, padding_idx=29)
    swap(model, StoredMatrix("embed", "embedding", (30, 24), 16, LEVELS))
    hold(model.embed, [table], 8)
    model.embed.bits = 8
    ids = torch.tensor([[3, 29, 0]])
    assert torch.equal(model.embed(ids), 5.5 * table.dequantize(8)[ids])


def test_the_weight_that_modules_are_asked_for() -> None:
    """Its dtype and shape are those of the weight, it costs no memory, and it has the values of the width in use."""
    module, weight = linear(bias=False)
    for bits in (3, 8):
        module.bits = bits
        expected = weight.dequantize(bits)
        asked = module.weight
        assert (asked.dtype, asked.shape, asked.device) == (torch.float32, expected.shape, torch.device("cpu"))
        x = torch.randn(2, expected.shape[1])
        assert torch.equal(x @ asked.T, x @ expected.T) and torch.equal(F.linear(x, asked), F.linear(x, expected))
        assert "LazyWeight" in repr(asked)
    assert module.bfloat16().weight.dtype == torch.bfloat16
    turned = NestedLinear(StoredMatrix("m", "conv1d", tuple(expected.shape), 16, LEVELS), None, torch.float32)
    with pytest.raises(AttributeError):
        _ = turned.weight
    hold(turned, [weight], 8)
    turned.bits = 8
    assert turned.weight.shape == expected.T.shape and torch.equal(turned.weight + 0, expected.T)


def test_strange_embeddings_are_refused() -> None:
    class Odd(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids).tanh()

    model = Toy()
    model.embed = Odd(30, 24)
    with pytest.raises(ElastiqError, match="embed: Odd is an embedding of its own kind; keep it in 16 bits"):
        swap(model, StoredMatrix("embed", "embedding", (30, 24), 16, LEVELS))
