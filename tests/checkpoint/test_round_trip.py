"""What is written comes back, at the counted size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoint import (
    LEVELS,
    SMALL,
    contents,
    random_recipe,
    random_weight,
    row,
    small_base,
    small_unit,
    write_small,
)

from elastiq.checkpoint import CheckpointReader, CheckpointWriter
from elastiq.checkpoint.tensors import read_header
from elastiq.core import Codes, ElastiqError, QuantizedWeight, Site
from elastiq.linalg import pack_planes, unpack_planes
from elastiq.runtime import NestedLinear

level_sets = st.sets(st.integers(1, 8), min_size=1).map(lambda levels: tuple(sorted(levels)))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_planes(bits: int, lead: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, width), generator=generator, dtype=torch.uint8)
    planes = pack_planes(codes, bits)
    assert all(plane.shape == (*lead, -(-width // 8)) for plane in planes)
    for kept in range(1, bits + 1):
        assert torch.equal(unpack_planes(planes[:kept], width), codes >> (bits - kept))
    assert torch.equal((planes[0][..., 0] & 1), (codes[..., 0] >> (bits - 1)))


@settings(max_examples=25, deadline=None)
@given(
    levels=level_sets,
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    group_size=st.integers(1, 50),
    symmetric=st.booleans(),
    experts=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_unit(
    tmp_path_factory: pytest.TempPathFactory,
    levels: tuple[int, ...],
    shape: tuple[int, int],
    group_size: int,
    symmetric: bool,
    experts: int,
    seed: int,
) -> None:
    sites = [Site("m.up", "linear", shape, 0, "m")]
    sites += [Site(f"m.experts.{e}", "expert", shape, 0, "m", e) for e in range(experts)]
    weights = {s: random_weight(s.shape, levels, group_size, symmetric, seed + i) for i, s in enumerate(sites)}
    output = tmp_path_factory.mktemp("unit") / "out"
    with CheckpointWriter(output, {}) as writer:
        writer.write_unit("block-0", weights, [row(site, weight) for site, weight in weights.items()])
        back = writer.read_unit("block-0")
    assert set(back) == {site.name for site in sites}
    for site, weight in weights.items():
        (was,), (now,) = weight.terms, back[site.name].terms
        assert isinstance(was, Codes)
        assert isinstance(now, Codes)
        assert torch.equal(was.codes, now.codes)
        assert (was.grid.levels, was.grid.group_size, was.grid.symmetric) == (
            now.grid.levels,
            now.grid.group_size,
            now.grid.symmetric,
        )
        assert torch.equal(was.grid.scale, now.grid.scale)
        assert torch.equal(was.grid.zero_point, now.grid.zero_point)


def weights_of(levels: tuple[int, ...], symmetric: bool) -> dict[Site, QuantizedWeight]:
    return {site: weight for unit in SMALL for site, weight in small_unit(unit, levels, symmetric).items()}


@pytest.mark.parametrize("levels", [LEVELS, (4,), (1, 3), (8,), (5, 6, 7)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_modules_read_what_solvers_wrote(tmp_path: Path, levels: tuple[int, ...], symmetric: bool) -> None:
    reader = CheckpointReader(write_small(tmp_path / "out", levels, symmetric))
    assert reader.available == ((4,) if levels == (4,) else (8,) if levels == (8,) else tuple(range(1, levels[-1] + 1)))
    assert reader.levels == levels
    for site, weight in weights_of(levels, symmetric).items():
        matrix = reader.manifest.matrices[site.tensor]
        module = NestedLinear(matrix, None, torch.float32)
        for plane in range(1, reader.planes + 1):
            for _, arrays in reader.plane(plane, [site.tensor]):
                module.hold(arrays)
        for bits in reader.available:
            module.bits = bits
            assert torch.equal(module.dense(site.expert), weight.dequantize(bits))


@pytest.mark.parametrize("symmetric", [False, True])
def test_counted_bits_are_written_bits(tmp_path: Path, symmetric: bool) -> None:
    """Array sizes in the files, the claims of the terms, of the table and of the totals agree."""
    levels = (2, 3, 4)
    output = tmp_path / "out"
    site = Site("m.up", "linear", (24, 64), 0, "")
    weight = random_weight(site.shape, levels, 16, symmetric)
    with CheckpointWriter(output, {}) as writer:
        writer.write_unit("block-0", {site: weight}, [row(site, weight)])
        from_units = writer.read_unit("block-0")[site.name]
        (tmp_path / "source").mkdir()
        writer.finish(iter(()), tmp_path / "source", {}, random_recipe(levels, 16), {})
    sizes = {}
    for plane in range(1, 5):
        for name, entry in read_header(output / f"plane-{plane}.safetensors")[0].items():
            sizes[name] = entry.end - entry.start
    totals = json.loads((output / "levels.json").read_text())["totals"]
    assert totals["weights"] == site.num_weights
    for level in levels:
        names = ["m.up.weight", *(f"m.up.plane_{p}" for p in range(2, level + 1)), f"m.up.scale_{level}"]
        names += [] if symmetric else [f"m.up.zero_point_{level}"]
        written = 8 * sum(sizes[name] for name in names)
        assert written == weight.num_bits(level) == from_units.num_bits(level)
        assert written == totals["levels"][str(level)]["num_bits"]
        assert totals["levels"][str(level)]["bits_per_weight"] == level + (16 if symmetric else 32) / 16
        files = ["base", *(f"plane-{p}" for p in range(1, level + 1))]
        on_disk = sum((output / f"{name}.safetensors").stat().st_size for name in files)
        assert totals["levels"][str(level)]["file_bytes"] == on_disk
    assert sum(sizes.values()) * 8 == site.num_weights * 4 + 3 * (16 if symmetric else 32) * 24 * 4


def test_same_input_same_bytes(tmp_path: Path) -> None:
    first, second = write_small(tmp_path / "a"), write_small(tmp_path / "b")
    assert contents(first) == contents(second)


def test_base_is_kept_in_16_bits(tmp_path: Path) -> None:
    reader = CheckpointReader(write_small(tmp_path / "out"))
    base, given_base = dict(reader.base()), dict(small_base())
    kinds = {name: tensor.dtype for name, tensor in base.items()}
    assert kinds == {
        "model.norm.weight": torch.float16,
        "model.0.up.bias": torch.bfloat16,
        "model.0.gate": torch.float16,
        "model.0.count": torch.int64,
        "model.0.huge": torch.bfloat16,
    }
    assert torch.equal(base["model.norm.weight"], given_base["model.norm.weight"])
    assert torch.equal(base["model.0.gate"], given_base["model.0.gate"].half())
    assert base["model.0.count"] == 7


def test_what_travels_along(tmp_path: Path) -> None:
    output = write_small(tmp_path / "out")
    planes = {f"plane-{p}.safetensors" for p in range(1, 9)}
    assert {path.name for path in output.iterdir()} == planes | {
        "base.safetensors",
        "config.json",
        "recipe.json",
        "levels.json",
        "fingerprint.json",
        "model.safetensors.index.json",
        "checksums.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }


def bad_scale(weight: QuantizedWeight) -> QuantizedWeight:
    (term,) = weight.terms
    assert isinstance(term, Codes)
    grid = term.grid
    scale = grid.scale.clone()
    scale[0, 0, 0] = 1.0001
    return QuantizedWeight((Codes(term.codes, type(grid)(grid.levels, grid.group_size, scale, grid.zero_point)),))


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    site = Site("m.up", "linear", (4, 16), 0, "")
    weight = random_weight((4, 16), (2, 4), 16)
    with CheckpointWriter(tmp_path / "out", {}) as writer:

        def refuse(weights: dict[Site, QuantizedWeight], rows: list[dict], sentence: str) -> None:
            with pytest.raises(ElastiqError, match=sentence):
                writer.write_unit("block-0", weights, rows)
            assert writer.finished() == set()

        rows = [row(site, weight)]
        (term,) = weight.terms
        refuse({site: weight}, [], r"the level table names \[\], the matrices are \['m.up'\]")
        twice = {site: QuantizedWeight((term, term))}
        refuse(twice, rows, r"stores nested codes first and side terms after, not \(Codes, Codes\)")
        refuse({site: bad_scale(weight)}, rows, "scales are not finite half-precision values")
        refuse({site: random_weight((4, 8), (2, 4), 16)}, rows, r"codes \[4, 8\] and scales .* do not fit \[4, 16\]")
        refuse({site: weight}, [{**rows[0], "error": float("nan")}], "holds a number that is not finite")
        large = QuantizedWeight((Codes(term.codes + 16, term.grid),))
        refuse({site: large}, rows, "a code is larger than 4 bits allow")
        expert = Site("m.experts.1", "expert", (4, 16), 0, "", 1)
        refuse({expert: weight}, [row(expert, weight)], "must be all experts from 0 on")
        with pytest.raises(ElastiqError, match="use letters, digits"):
            writer.write_unit("../x", {site: weight}, rows)
        with pytest.raises(ElastiqError, match="no matrix was quantized"):
            (tmp_path / "source").mkdir()
            writer.finish(iter(()), tmp_path / "source", {}, random_recipe(), {})


def test_base_names(tmp_path: Path) -> None:
    site = Site("m.up", "linear", (4, 16), 0, "")
    weight = random_weight((4, 16))
    (tmp_path / "source").mkdir()
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.write_unit("block-0", {site: weight}, [row(site, weight)])
        for names in (["a", "a"], ["m.up.weight"], ["../a"]):
            base = iter([(name, torch.ones(2)) for name in names])
            with pytest.raises(
                ElastiqError, match=r"given twice for base\.safetensors, quantized as well, or not a plain"
            ):
                writer.finish(base, tmp_path / "source", {}, random_recipe(), {})
    assert not (tmp_path / "out").exists()
