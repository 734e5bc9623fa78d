"""Maps in which rows of a matrix or experts of a tensor differ."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import write_random
from transformers import AutoModelForCausalLM

import elastiq
from elastiq.allocate import Budget, Measurement, Stored, Table, allocate, frontier, read_stored, write_stored
from elastiq.allocate.cut import MOST_PARTS, Cut
from elastiq.allocate.losses import cuts, losses
from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.checkpoint.sizes import map_sizes
from elastiq.core import ElastiqError, LevelMap
from elastiq.runtime import StoredMatrix, bits_per_weight, nested_matrices


def make(family: str, tiny_model: Callable[[str], Path], output: Path) -> Path:
    source = tiny_model(family)
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    return output


def measured(path: Path) -> Measurement:
    """Losses of matrices and of their rows, a few of which matter far more than the others."""
    reader, generator = CheckpointReader(path), np.random.default_rng(0)
    made, groups = {}, []
    for name, matrix in reader.manifest.matrices.items():
        rows = np.exp(generator.normal(0, 2, matrix.num_weights // matrix.in_features))
        per_level = np.array([4.0**-level for level in reader.levels[:-1]] + [0.0])
        cut = Cut.of(matrix, per_level[:, None] * rows)
        if cut is not None:
            made[name] = cut
        scale = float(generator.uniform(0.5, 2.0))
        groups.append(((name,), dict(zip(reader.levels, (per_level * scale).tolist(), strict=True))))
    return Measurement({"name": "sampled-fisher"}, tuple(groups), {"name": "t.txt"}, 1.0, made)


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make("llama", tiny_model, tmp_path_factory.mktemp("parts") / "llama")
    write_stored(CheckpointReader(path), Stored((measured(path),)))
    return path


@pytest.fixture(scope="module")
def moe(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", tiny_model, tmp_path_factory.mktemp("parts") / "moe")


def test_rows_are_cut_by_what_they_lose_in_whole_tiles() -> None:
    rows = np.random.default_rng(0).random((3, 600))
    cut = Cut.of(StoredMatrix("m", "linear", (600, 64), 32, (2, 3, 8)), rows)
    assert cut is not None and len(cut.members) <= MOST_PARTS
    assert sorted(itertools.chain(*cut.members)) == list(range(600))
    assert all(len(part) % 16 == 0 for part in cut.members[:-1])
    assert np.allclose(cut.losses, [rows[:, part].sum(axis=1) for part in cut.members])
    weight = (rows / rows.sum(axis=1, keepdims=True)).sum(axis=0)
    least = [min(weight[list(part)]) for part in cut.members]
    assert all(low >= max(weight[list(part)]) for low, part in zip(least, cut.members[1:], strict=False))
    assert Cut.of(StoredMatrix("m", "linear", (16, 64), 32, (2, 8)), np.ones((2, 16))) is None
    assert Cut.of(StoredMatrix("m", "embedding", (600, 64), 32, (2, 8)), np.ones((2, 600))) is None
    experts = Cut.of(StoredMatrix("m", "expert", (3, 20, 64), 32, (2, 8)), np.arange(120.0).reshape(2, 60))
    assert experts is not None and experts.members == ((0,), (1,), (2,))
    assert np.allclose(experts.losses[:, 1], np.arange(60, 120).reshape(3, 20).sum(axis=1))


def test_stored_and_read_again(llama: Path) -> None:
    (found,) = read_stored(CheckpointReader(llama)).measurements
    expected = measured(llama)
    assert found.cuts.keys() == expected.cuts.keys()
    for name, cut in found.cuts.items():
        assert cut.members == expected.cuts[name].members and np.array_equal(cut.losses, expected.cuts[name].losses)


@pytest.mark.parametrize("broken", ["0 1 2", "0 0", "-1", "x", ""])
def test_a_cut_that_is_none_is_refused(llama: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(llama, tmp_path / "copy")
    file = tmp_path / "copy" / "sensitivity.json"
    data = json.loads(file.read_text())
    next(iter(data["measurements"][0]["cuts"].values()))["members"][0] = broken
    file.write_text(json.dumps(data))
    with pytest.raises(ElastiqError, match="not a table of sensitivities; remove it and measure again"):
        read_stored(CheckpointReader(tmp_path / "copy"))


def test_a_slice_reads_what_was_measured_of_the_whole(llama: Path, tmp_path: Path) -> None:
    """As a pull of fewer planes brings it."""
    slice_checkpoint(llama, 3, tmp_path / "slice")
    shutil.copy(llama / "sensitivity.json", tmp_path / "slice")
    reader = CheckpointReader(tmp_path / "slice")
    (found,), (whole,) = read_stored(reader).measurements, read_stored(CheckpointReader(llama)).measurements
    for name, cut in found.cuts.items():
        assert np.array_equal(cut.losses, whole.cuts[name].losses[:, : len(reader.levels)])
    for rows in (False, True):
        assert allocate(tmp_path / "slice", Budget(bits=2.5), rows=rows).sizes["mean_bits"] <= 2.5


def test_parts_share_what_their_matrix_loses(llama: Path) -> None:
    """Also where several matrices were measured together."""
    reader = CheckpointReader(llama)
    stored = read_stored(reader)
    (whole,) = stored.measurements
    together = [name for name in reader.manifest.matrices if name.endswith(("layers.0.mlp.gate_proj", "0.mlp.up_proj"))]
    groups = tuple(group for group in whole.groups if group[0][0] not in together)
    joint = (tuple(together), {level: 5.0 * (4.0**-level - 4.0**-8) for level in reader.levels})
    kl = replace(whole, method={"name": "kl"}, groups=(*groups, joint), cuts={})
    stored = Stored((whole, kl))
    table = Table.of(reader, True, cuts=cuts(reader, stored, True, True))
    for name in ("sampled-fisher", "kl"):
        measurement, loss = losses(reader, table, stored, name)
        for matrices, values in measurement.groups:
            inside = [index for index, group in enumerate(table.groups) if group[0] in matrices]
            assert loss[inside].sum(axis=0) == pytest.approx(list(values.values()))
    _, loss = losses(reader, table, stored, "sampled-fisher")
    (first,) = [group for group in whole.groups if group[0] == (together[0],)]
    inside = [index for index, group in enumerate(table.groups) if group == (together[0],)]
    cut = whole.cuts[together[0]]
    share = cut.losses[:, 0] / cut.losses[:, 0].sum()
    assert loss[inside, 0] == pytest.approx(share * first[1][reader.levels[0]])


@pytest.mark.parametrize(
    ("budget", "unit"),
    [
        (Budget(bits=2.7), "mean_bits"),
        (Budget(bits=4.0), "mean_bits"),
        (Budget(bits_per_weight=4.6), "bits_per_weight"),
        (Budget(size=202_200), "bytes_in_memory"),
        (Budget(bits=3.3, size=192_200), "mean_bits"),
    ],
)
def test_rows_within_every_budget(llama: Path, budget: Budget, unit: str) -> None:
    found, whole = allocate(llama, budget, rows=True), allocate(llama, budget)
    assert any(isinstance(width, str) for width in found.level_map.widths.values())
    assert found.loss < whole.loss, "rows that matter are few here"
    limits = {"bits": "mean_bits", "bits_per_weight": "bits_per_weight", "size": "bytes_in_memory"}
    for given, limit in budget.given.items():
        assert found.sizes[limits[given]] <= limit
    model = elastiq.load(llama, bits=found.level_map)
    held = sum(b.nbytes for m in nested_matrices(model).values() for b in m.buffers())
    assert found.sizes["bytes_in_memory"] == held + Table.of(CheckpointReader(llama)).base_bytes
    assert found.sizes["bits_per_weight"] == pytest.approx(bits_per_weight(model), rel=1e-12)
    assert found.sizes[unit] == map_sizes(CheckpointReader(llama), found.level_map.widths)[unit]


def test_a_map_of_whole_matrices_where_rows_gain_nothing(llama: Path) -> None:
    for bits in (2.0, 8.0):
        assert set(allocate(llama, Budget(bits=bits), rows=True).level_map.widths.values()) == {int(bits)}


@pytest.mark.parametrize("rows", [False, True])
def test_the_frontier_in_parts(llama: Path, rows: bool) -> None:
    reader = CheckpointReader(llama)
    curve = frontier(llama, rows=rows)
    assert set(curve.widths(0).values()) == {2} and set(curve.widths(len(curve.steps)).values()) == {8}
    for count in range(0, len(curve.steps), 7):
        sizes = map_sizes(reader, LevelMap(curve.widths(count + 1)).widths)
        assert sizes["mean_bits"] == pytest.approx(curve.steps[count].mean_bits)
        assert sizes["bits_per_weight"] <= curve.steps[count].bits_per_weight + 1e-9


def test_untied_experts_differ(moe: Path) -> None:
    """By the level table alone: experts that lose more get more bits; tied ones share a level."""
    reader = CheckpointReader(moe)
    for row in reader.table:
        matter = 1e4 if row["role"] == "expert" and row["name"].endswith(".1") else 1.0
        row["levels"] = {level: {**cell, "error": matter * cell["error"]} for level, cell in row["levels"].items()}
    tied, found = allocate(reader, Budget(bits=4.0)), allocate(reader, Budget(bits=4.0), untie=True)
    assert all(isinstance(width, int) for width in tied.level_map.widths.values())
    for name, width in found.level_map.widths.items():
        if reader.manifest.matrices[name].role == "expert":
            assert isinstance(width, str) and all(width[1] >= digit for digit in width)
    assert found.loss < tied.loss and found.sizes["mean_bits"] <= 4.0
    elastiq.load(moe, bits=found.level_map)


def test_what_cannot_be_said_of_rows_is_refused(moe: Path, llama: Path) -> None:
    with pytest.raises(ElastiqError, match=r"nothing is known of rows; run elastiq sensitivity .* --method sampled"):
        allocate(moe, Budget(bits=4.0), rows=True)
    with pytest.raises(ElastiqError, match="whole matrices are timed, not their rows; give --latency without --rows"):
        allocate(llama, Budget(latency=0.01), rows=True)
