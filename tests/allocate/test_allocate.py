"""From a budget to a map, on a checkpoint with every kind of matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_checkpoint import write_random, write_small
from transformers import AutoModelForCausalLM

import elastiq
from elastiq.allocate import (
    Budget,
    Measurement,
    Stored,
    Table,
    allocate,
    frontier,
    parse_bytes,
    parse_seconds,
    read_map,
    read_stored,
    write_map,
    write_stored,
)
from elastiq.checkpoint import CheckpointReader
from elastiq.checkpoint.sizes import held_bytes
from elastiq.core import Damage, ElastiqError, LevelMap
from elastiq.models import fused_groups
from elastiq.runtime import NestedMatrix, StoredMatrix, bits_per_weight, bytes_in_memory, nested_matrices


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("allocate") / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), tiny_model("llama"), output)
    return output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


def test_ties() -> None:
    block = "model.layers.0"
    names = [f"{block}.self_attn.{x}_proj" for x in "qkvo"] + [f"{block}.mlp.{x}_proj" for x in ("gate", "up", "down")]
    names += ["model.layers.1.self_attn.q_proj", "h.0.mlp.experts.gate_up_proj", "h.0.mlp.experts.down_proj"]
    groups = fused_groups(names)
    assert [len(group) for group in groups] == [3, 1, 2, 1, 1, 2]
    assert sorted(name for group in groups for name in group) == sorted(names)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("bits", [2.0, 2.25, 3.37, 5.01, 8.0])
def test_counted_costs_are_those_of_the_loaded_model(llama: Path, bits: float, untie: bool) -> None:
    found = allocate(llama, Budget(bits=bits), untie=untie)
    model = elastiq.load(llama, bits=found.level_map)
    matrices = nested_matrices(model)
    weights = sum(m.stored.num_weights for m in matrices.values())
    mean = sum(m.bits * m.stored.num_weights for m in matrices.values()) / weights
    assert found.sizes["mean_bits"] == pytest.approx(mean, rel=1e-12) and mean <= bits
    assert found.sizes["bits_per_weight"] == pytest.approx(bits_per_weight(model), rel=1e-12)
    held = sum(b.nbytes for m in matrices.values() for b in m.buffers())
    reader = CheckpointReader(llama)
    assert found.sizes["bytes_in_memory"] == held + Table.of(reader).base_bytes
    groups = fused_groups(matrices) if not untie else []
    assert all(len({matrices[name].bits for name in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("given", "unit"),
    [
        ({"bits": 3.3}, "mean_bits"),
        ({"bits_per_weight": 4.6}, "bits_per_weight"),
        ({"size": 197_200}, "bytes_in_memory"),
    ],
)
def test_budgets_are_hard_and_used_up(llama: Path, given: dict[str, float], unit: str) -> None:
    reader = CheckpointReader(llama)
    found = allocate(reader, Budget(**given))  # type: ignore[arg-type]
    (limit,) = given.values()
    assert found.sizes[unit] <= limit
    table = Table.of(reader)
    choices = table.choices(found.level_map.widths)
    for index, choice in enumerate(choices):
        if choice + 1 < len(table.levels):
            raised = table.widths((*choices[:index], choice + 1, *choices[index + 1 :]))
            assert LevelMap(raised) != found.level_map
            cost = {"bits": "bits", "bits_per_weight": "bits_per_weight", "size": "size"}[next(iter(given))]
            extra = float(table.costs[cost][index, choice + 1] - table.costs[cost][index, choice])
            per = {"bits": table.weights, "bits_per_weight": table.weights, "size": 1}[cost]
            assert found.sizes[unit] + extra / per > limit


@pytest.mark.parametrize("shape", [(7, 65), (33, 40), (3, 20, 96)])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_bytes_held_are_counted_exactly(shape: tuple[int, ...], bits: int) -> None:
    """Shapes that fill no tile."""
    stored = StoredMatrix("m", "expert" if len(shape) == 3 else "linear", shape, 32, (2, 3, 8))
    module = NestedMatrix(stored, torch.float32)
    for plane in range(1, bits + 1):
        module.hold({name: torch.ones(size, dtype=dtype) for name, (dtype, size) in stored.arrays(plane).items()})
    assert held_bytes(stored, bits) == sum(buffer.nbytes for buffer in module.buffers())


def test_several_limits_hold_together(llama: Path) -> None:
    both = allocate(llama, Budget(bits=4.0, size=192_200))
    assert both.sizes["mean_bits"] <= 4.0 and both.sizes["bytes_in_memory"] <= 192_200
    assert both.loss >= allocate(llama, Budget(bits=4.0)).loss


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bits": 1.5}, r"1.5 bits is less than the smallest map, which takes 2 bits \(every matrix at 2 bits\)"),
        ({"bits_per_weight": 2.2}, r"2.2 bits per weight is less than the smallest map, which takes 3 bits per weight"),
        ({"size": 1000}, r"1000 bytes is less than the smallest map, which takes \d+ bytes"),
        ({"bits": -1.0}, "bits=-1 is not a positive number"),
        ({}, "give a limit"),
    ],
)
def test_budgets_below_the_smallest_map_are_refused_with_that_number(
    llama: Path, given: dict[str, float], sentence: str
) -> None:
    with pytest.raises(ElastiqError, match=sentence):
        allocate(llama, Budget(**given))  # type: ignore[arg-type]


def test_the_smallest_size_named_is_one_that_works(llama: Path) -> None:
    with pytest.raises(ElastiqError) as refused:
        allocate(llama, Budget(size=1000))
    least = int(str(refused.value).split("takes ")[1].split(" bytes")[0])
    assert allocate(llama, Budget(size=least)).sizes["bytes_in_memory"] == least
    with pytest.raises(ElastiqError):
        allocate(llama, Budget(size=least - 1))


def test_more_than_the_widest_map_says_so(llama: Path) -> None:
    found = allocate(llama, Budget(bits=8.0))
    assert set(found.level_map.widths.values()) == {8}
    assert "the budget exceeds the widest map there is" in found.notes


def test_a_map_that_loses_more_than_uniform_is_not_taken(llama: Path) -> None:
    random = allocate(llama, Budget(bits=4.0), allocator="random")
    assert random.uniform is not None and random.loss <= random.uniform["loss"]
    assert any("uniform map at 4 bits" in note for note in random.notes)


def test_memory_counts_everything_that_the_loaded_model_holds(llama: Path) -> None:
    rest = bytes_in_memory(elastiq.load(llama, bits=4)) - 20_000
    model = elastiq.load(llama, memory=rest)
    assert rest - 20_000 < bytes_in_memory(model) <= rest
    assert len({m.bits for m in nested_matrices(model).values()}) > 1
    with pytest.raises(ElastiqError, match="less than the smallest map"):
        elastiq.load(llama, memory=10_000)
    with pytest.raises(ElastiqError, match="give no bits or max_bits beside it"):
        elastiq.load(llama, bits=3, memory="1GB")


def test_fractions_maps_and_files_load(llama: Path, tmp_path: Path) -> None:
    found = allocate(llama, Budget(bits=3.37))
    write_map(tmp_path / "map.json", found.level_map)
    for bits in (3.37, found.level_map, tmp_path / "map.json", str(tmp_path / "map.json")):
        model = elastiq.load(llama, bits=bits)
        assert {n: m.bits for n, m in nested_matrices(model).items()} == dict(found.level_map.widths)
    elastiq.set_bits(model, 2.5)
    assert {m.bits for m in nested_matrices(model).values()} <= {2, 3, 4, 6}


def test_every_role_and_a_directory_of_fewer_planes(small: Path) -> None:
    found = allocate(small, Budget(bits=3.0))
    assert found.level_map.widths["model.0.experts.up"] in (2, 3, 4, 6, 8)
    for plane in (7, 8):
        (small / f"plane-{plane}.safetensors").unlink()
    assert max(allocate(small, Budget(bits=8.0)).level_map.widths.values()) == 6


def test_frontier_goes_up_one_step_at_a_time(llama: Path) -> None:
    curve = frontier(llama)
    reader = CheckpointReader(llama)
    table = Table.of(reader)
    losses = [step.loss for step in curve.steps]
    sizes = [step.bits_per_weight for step in curve.steps]
    assert losses == sorted(losses, reverse=True) and sizes == sorted(sizes)
    assert set(curve.widths(len(curve.steps)).values()) == {8}
    for count in (0, 3, len(curve.steps)):
        mean = curve.steps[count - 1].mean_bits if count else 2.0
        found = allocate(reader, Budget(bits=mean), allocator="lagrangian")
        assert table.choices(curve.widths(count)) == table.choices(found.level_map.widths)
    assert set(curve.uniform) == {2, 3, 4, 6, 8}


def test_stored_measurements_are_used_and_predict_damage(small: Path) -> None:
    reader = CheckpointReader(small)
    scale = {"model.0.up": 100.0}
    groups = tuple(
        ((name,), {level: scale.get(name, 1.0) * 4.0**-level for level in reader.levels})
        for name in reader.manifest.matrices
    )
    uniform = {level: Damage(3 * sum(row[level] for _, row in groups), 0.0) for level in reader.levels}
    write_stored(reader, Stored((Measurement({"name": "kl"}, groups, {"text": "t"}, 1.0),), uniform, {"text": "t"}))
    found = allocate(small, Budget(bits=4.0))
    assert found.sensitivity == "kl" and found.level_map.widths["model.0.up"] > 4
    assert found.kl == pytest.approx(3 * found.loss, rel=0.02)
    bounded = allocate(small, Budget(), max_kl=0.5)
    assert bounded.kl is not None and bounded.kl <= 0.5
    below = bounded.sizes["bits_per_weight"] - 0.2
    smaller = allocate(small, Budget(bits_per_weight=below))
    assert smaller.kl is not None and smaller.kl > 0.5
    with pytest.raises(ElastiqError, match="kl=1e-09 cannot be had"):
        allocate(small, Budget(), max_kl=1e-9)
    assert read_stored(reader).named("kl") is not None


def test_what_was_not_measured_is_refused(small: Path) -> None:
    with pytest.raises(ElastiqError, match="sensitivity 'unknown_thing' does not exist"):
        allocate(small, Budget(bits=4.0), sensitivity="unknown_thing")
    with pytest.raises(ElastiqError, match="nothing measured says what a loss means"):
        allocate(small, Budget(), max_kl=0.1)
    with pytest.raises(ElastiqError, match="unknown name 'best'"):
        allocate(small, Budget(bits=4.0), allocator="best")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"format_version": 1}',
        '{"format_version": 2, "checkpoint": "", "uniform": {"text": null, "levels": {}}, "measurements": []}',
        '{"format_version": 1, "checkpoint": "x", "uniform": {"text": null, "levels": {}}, "measurements": []}',
    ],
)
def test_broken_sensitivities_are_refused(small: Path, content: str) -> None:
    (small / "sensitivity.json").write_text(content)
    with pytest.raises(ElastiqError, match=r"sensitivity\.json"):
        allocate(small, Budget(bits=4.0))


def map_text(**changes: object) -> str:
    return json.dumps({"kind": "elastiq level map", "format_version": 1, "widths": {"a": 3}} | changes)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("no json", "not readable as JSON"),
        ("[1]", "not a level map"),
        (map_text(kind="other"), "not a level map"),
        (map_text(format_version=2), "format version 2 is not 1"),
        (map_text(widths=[3]), "its widths are no table"),
        (map_text(widths={}), "it names no matrix"),
        (map_text(widths={"a": 9}), "has the width 9, which is none from 1 to 8"),
        (map_text(widths={"a": True}), "a=True is a truth value; give a number"),
        (map_text(widths={"a": 2.5}), "has the width 2.5"),
    ],
)
def test_broken_maps_are_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ElastiqError, match=sentence):
        read_map(tmp_path / "map.json")


def test_a_map_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    write_map(tmp_path / "map.json", LevelMap({"other.matrix": 3}))
    with pytest.raises(ElastiqError, match=r"other\.matrix: no quantized matrix"):
        elastiq.load(llama, bits=tmp_path / "map.json")
    with pytest.raises(ElastiqError, match="no such level map"):
        elastiq.load(llama, bits=tmp_path / "absent.json")


def test_sizes_and_times_as_people_write_them() -> None:
    assert parse_bytes("1.2GB") == 1_200_000_000 and parse_bytes("1.5 MiB") == 1_572_864 and parse_bytes(77) == 77
    assert math.isclose(parse_seconds("35ms"), 0.035) and parse_seconds("2s") == 2.0
    for wrong in ("", "GB", "-1MB", "1.2XB", "1e9"):
        with pytest.raises(ElastiqError, match="is not a size"):
            parse_bytes(wrong)
    with pytest.raises(ElastiqError, match="is not a time"):
        parse_seconds("35")
