"""A checkpoint that is copied in part, cut, altered, or made to deceive."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import contents, small_unit, write_small

from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.core import ElastiqError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("original") / "out")


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "out")


def use(path: Path) -> None:
    """Read everything."""
    reader = CheckpointReader(path)
    dict(reader.base())
    for name in reader.manifest.matrices:
        reader.read(name, reader.available[-1])
    assert reader.table


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file, and its checksum with it: an altered file is another matter than a wrong one."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    drop_checksum(path)


def drop_checksum(path: Path) -> None:

    table = path.with_name("checksums.json")
    if path == table:
        return
    sums = json.loads(table.read_text())
    sums["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    table.write_text(json.dumps(sums))


def quantization(key: str, value: Any) -> Callable[[Path], None]:
    return lambda out: edit(out / "config.json", lambda data: data["quantization_config"].__setitem__(key, value))


def module(change: dict[str, Any]) -> Callable[[Path], None]:
    return lambda out: edit(
        out / "config.json", lambda data: data["quantization_config"]["modules"]["model.0.up"].update(change)
    )


def shift_of(shape: list[int]) -> dict[str, Any]:
    """A part that adds a vector to the outputs of a matrix of this shape."""
    facts, arrays = {"level": 0, "shape": shape}, {"amount": ["F16", [2], 1, []]}
    return {"kind": "shift", "prefix": "side_0_", "expert": None, "facts": facts, "arrays": arrays}


def flip(name: str, position: int = -1) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        data = bytearray((out / name).read_bytes())
        data[position] ^= 1
        (out / name).write_bytes(data)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-7])  # type: ignore[return-value]


def remove(*names: str) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        for name in names:
            (out / name).unlink()

    return change


def index_entry(name: str, file: str) -> Callable[[Path], None]:
    return lambda out: edit(
        out / "model.safetensors.index.json", lambda data: data["weight_map"].__setitem__(name, file)
    )


def checksum_entry(name: str) -> Callable[[Path], None]:
    return lambda out: edit(out / "checksums.json", lambda data: data["files"].__setitem__(name, {"sha256": "0"}))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (lambda out: shutil.rmtree(out), "no such directory; give the output of elastiq quantize"),
    "no config": (remove("config.json"), "not an elastiq checkpoint (it has no config.json)"),
    "another model": (
        lambda out: edit(out / "config.json", lambda data: data.pop("quantization_config")),
        "not an elastiq checkpoint; make one with elastiq quantize",
    ),
    "another method": (quantization("quant_method", "gptq"), "not an elastiq checkpoint; make one with"),
    "newer": (
        quantization("format_version", 2),
        "format version 2 is newer than 1, all this elastiq reads; upgrade it",
    ),
    "odd version": (
        quantization("format_version", "1"),
        "format_version of the quantization_config in config.json is '1'",
    ),
    "no levels": (quantization("levels", []), "levels of the quantization_config in config.json is []"),
    "levels in disorder": (quantization("levels", [4, 2]), "is [4, 2], which cannot be; copy config.json again"),
    "a level too wide": (quantization("levels", [2, 99]), "is [2, 99], which cannot be"),
    "a level of true": (quantization("levels", [True, 8]), "is [True, 8], which cannot be"),
    "too many planes": (
        quantization("planes", 10**9),
        "planes of the quantization_config in config.json is 1000000000",
    ),
    "symmetric of words": (
        quantization("symmetric", "no"),
        "symmetric of the quantization_config in config.json is 'no'",
    ),
    "scales of an unknown kind": (module({"scales": "int9"}), "modules.model.0.up.scales of the quantization_config"),
    "scales of whole matrices": (module({"scales": "e4m3"}), "modules.model.0.up.scales of the quantization_config"),
    "scales of no kind": (module({"scales": 3}), "modules.model.0.up.scales of the quantization_config"),
    "a group of nothing": (quantization("group_size", 0), "group_size of the quantization_config in config.json is 0"),
    "no modules": (quantization("modules", {}), "modules of the quantization_config in config.json is {}"),
    "module of a bad name": (
        quantization("modules", {"../up": {"role": "linear", "shape": [8, 8], "group_size": 8}}),
        "modules.../up of the quantization_config",
    ),
    "an unknown role": (module({"role": "exec"}), "modules.model.0.up of the quantization_config"),
    "a negative shape": (
        module({"shape": [-1, 40]}),
        "modules.model.0.up.shape of the quantization_config in config.json is",
    ),
    "a shape of three": (module({"shape": [2, 24, 40]}), "is [2, 24, 40], which cannot be"),
    "an enormous shape": (module({"shape": [2**40, 2**40]}), "which cannot be"),
    "a part of another shape": (
        module({"parts": [shift_of([3 * 2**28, 56])]}),
        "modules.model.0.up.parts of the quantization_config in config.json is {'level': 0, 'shape'",
    ),
    "a group too large": (module({"group_size": 2**31}), "modules.model.0.up.group_size of the quantization_config"),
    "a group size of words": (module({"group_size": "16"}), "modules.model.0.up.group_size of the quantization_config"),
    "another shape": (
        module({"shape": [24, 64]}),
        "plane-1.safetensors: model.0.up.scale_2 is float16 [24, 3], config.json says float16 [24, 4]; copy both files",
    ),
    "config is a list": (lambda out: (out / "config.json").write_text("[]"), "not an elastiq checkpoint; make one"),
    "config is deep": (lambda out: (out / "config.json").write_text("[" * 200_000), "not readable as JSON"),
    "config is noise": (lambda out: (out / "config.json").write_bytes(b"\xff\x00"), "not readable as JSON; copy it"),
    "config altered": (
        lambda out: (out / "config.json").write_bytes((out / "config.json").read_bytes() + b" "),
        "config.json: altered (its checksum is not the recorded one); copy it again",
    ),
    "levels.json altered": (flip("levels.json", 60), "levels.json: altered (its checksum is not the recorded one)"),
    "levels.json another": (lambda out: edit(out / "levels.json", lambda data: data.clear()), "not a level table"),
    "a broken row": (
        lambda out: edit(out / "levels.json", lambda data: data["matrices"][0].update(levels=5)),
        "its row 'model.0.up' is broken; copy it",
    ),
    "a row of nothing": (
        lambda out: edit(out / "levels.json", lambda data: data["matrices"].append(None)),
        "its row None is broken",
    ),
    "levels.json missing": (remove("levels.json"), "levels.json: cannot be read (No such file or directory)"),
    "plane missing": (
        remove("plane-3.safetensors"),
        "plane-3.safetensors is missing, planes 4 to 8 are of no use without it; copy it from the original",
    ),
    "first plane missing": (
        remove("plane-1.safetensors"),
        "plane-1.safetensors is missing, no width can be read without it; copy it from the original",
    ),
    "all planes missing": (
        remove(*(f"plane-{p}.safetensors" for p in range(1, 9))),
        "plane-1.safetensors is missing, no width can be read without it",
    ),
    "base missing": (remove("base.safetensors"), "base.safetensors: cannot be read (No such file or directory)"),
    "plane cut": (cut("plane-8.safetensors"), "plane-8.safetensors: cut short, "),
    "base cut": (cut("base.safetensors"), "base.safetensors: cut short, "),
    "plane altered": (
        flip("plane-5.safetensors"),
        "plane-5.safetensors: altered (its checksum is not the recorded one)",
    ),
    "base altered": (flip("base.safetensors"), "base.safetensors: altered (its checksum is not the recorded one)"),
    "planes swapped": (
        lambda out: shutil.copy(out / "plane-5.safetensors", out / "plane-7.safetensors"),
        "plane-7.safetensors: model.0.down.plane_5 is uint8 [16, 7], config.json says absent; copy both files from one",
    ),
    "no checksums": (remove("checksums.json"), "checksums.json: cannot be read (No such file or directory)"),
    "checksums of nothing": (
        lambda out: (out / "checksums.json").write_text('{"files": 3}'),
        "not a table of checksums",
    ),
    "checksums elsewhere": (checksum_entry("../secret"), "not a table of checksums; copy it from the original"),
    "checksum lost": (
        lambda out: edit(out / "checksums.json", lambda data: data["files"].pop("plane-2.safetensors")),
        "checksums.json does not cover plane-2.safetensors; copy checksums.json from the original",
    ),
    "index elsewhere": (
        index_entry("model.0.up.weight", "../../etc/passwd"),
        "it names something else than files of this directory; get the checkpoint again",
    ),
    "index absolute": (index_entry("model.0.up.weight", "/etc/passwd"), "it names something else than files of this"),
    "index false": (
        index_entry("model.0.up.weight", "plane-2.safetensors"),
        "it does not fit config.json and base.safetensors; copy it from the same checkpoint",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_sentence(out: Path, fault: str) -> None:
    use(out)
    change, sentence = FAULTS[fault]
    change(out)
    with pytest.raises(ElastiqError) as error:
        use(out)
    assert sentence in str(error.value)
    assert str(out) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["plane-1.safetensors", "plane-4.safetensors", "base.safetensors"])
def test_any_altered_byte_is_found(out: Path, file: str) -> None:
    size = (out / file).stat().st_size
    for position in range(0, size, size // 25):
        flip(file, position)(out)
        with pytest.raises(ElastiqError):
            use(out)
        flip(file, position)(out)
    use(out)


def test_unused_files_are_not_hashed(out: Path) -> None:
    flip("plane-8.safetensors")(out)
    reader = CheckpointReader(out)
    reader.read("model.0.up", 7)
    with pytest.raises(ElastiqError, match=r"plane-8\.safetensors: altered"):
        reader.read("model.0.up", 8)
    CheckpointReader(out, verify=False).read("model.0.up", 8)


def copy_by_hand(original: Path, target: Path, planes: int) -> Path:
    target.mkdir()
    files = [*original.glob("*.json"), original / "base.safetensors"]
    for path in files + [original / f"plane-{p}.safetensors" for p in range(1, planes + 1)]:
        shutil.copy(path, target)
    return target


@pytest.mark.parametrize("planes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("sliced", [False, True])
def test_fewer_planes(original: Path, tmp_path: Path, planes: int, sliced: bool) -> None:
    """A directory without the last planes reads at every width it holds, as the whole one does, and says which."""
    target = tmp_path / "small"
    if sliced:
        slice_checkpoint(original, planes, target)
    else:
        copy_by_hand(original, target, planes)
    reader = CheckpointReader(target)
    assert reader.available == tuple(range(1, planes + 1))
    assert reader.levels == tuple(level for level in (2, 3, 4, 6, 8) if level <= planes)
    dict(reader.base())
    for bits in reader.available:
        for name in reader.manifest.matrices:
            whole, part = CheckpointReader(original, verify=False).read(name, bits), reader.read(name, bits)
            assert whole.keys() == part.keys()
            assert all(torch.equal(whole[key], part[key]) for key in whole)
    if planes == 8:
        return
    with pytest.raises(ElastiqError) as error:
        reader.require(8)
    widths = {1: "1", 2: "1 or 2", 3: "1 to 3", 5: "1 to 5"}[planes]
    missing = ", ".join(f"plane-{p}.safetensors" for p in range(planes + 1, 9))
    remedy = "ask for one of these" if sliced else f"copy {missing} beside the others for more"
    assert str(error.value) == f"{target}: it can be read at {widths} bits, not 8; {remedy}"


def test_widths_that_never_were(original: Path) -> None:
    reader = CheckpointReader(original)
    for bits in (0, 9, -1):
        with pytest.raises(ElastiqError) as error:
            reader.require(bits)
        assert str(error.value) == f"{original}: it can be read at 1 to 8 bits, not {bits}; ask for one of these"


def test_names_that_are_not(original: Path) -> None:
    reader = CheckpointReader(original)
    with pytest.raises(
        ElastiqError, match=r"model\.9\.up: no quantized matrix of .* has this name; names are like model"
    ):
        reader.read("model.9.up", 3)
    with pytest.raises(ElastiqError, match=r"experts of one tensor share a width; set model\.0\.experts\.up"):
        reader.read("model.0.experts.up.2", 3)


def test_a_single_level(tmp_path: Path) -> None:
    output = write_small(tmp_path / "out", (4,))
    reader = CheckpointReader(output)
    assert reader.available == reader.levels == (4,)
    with pytest.raises(ElastiqError, match="it can be read at 4 bits, not 3; ask for one of these"):
        reader.require(3)
    with pytest.raises(ElastiqError, match="it can be read at 4 bits, not 3"):
        slice_checkpoint(output, 3, tmp_path / "small")
    (output / "plane-4.safetensors").unlink()
    with pytest.raises(ElastiqError) as error:
        CheckpointReader(output)
    assert str(error.value) == (
        f"{output}: plane-4.safetensors is missing, the one width of this checkpoint, 4 bits, needs it; "
        "copy it from the original"
    )


def test_a_slice_is_true(original: Path, tmp_path: Path) -> None:
    small, smaller, direct = tmp_path / "small", tmp_path / "smaller", tmp_path / "direct"
    slice_checkpoint(original, 4, small)
    index = json.loads((small / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"base.safetensors", *(f"plane-{p}.safetensors" for p in range(1, 5))}
    assert {"tokenizer.json", "LICENSE", "levels.json", "recipe.json"} <= contents(small).keys()
    assert json.loads((small / "config.json").read_text())["quantization_config"]["planes"] == 4
    assert set(json.loads((small / "checksums.json").read_text())["files"]) == contents(small).keys() - {
        "checksums.json"
    }
    use(small)
    slice_checkpoint(small, 2, smaller)
    slice_checkpoint(original, 2, direct)
    assert contents(smaller) == contents(direct)
    whole = tmp_path / "whole"
    slice_checkpoint(original, 8, whole)
    assert contents(whole) == contents(original)


def test_slices_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match="exists already; choose another output"):
        slice_checkpoint(out, 3, out)
    slice_checkpoint(out, 3, tmp_path / "small")
    with pytest.raises(ElastiqError, match="it can be read at 1 to 3 bits, not 4; ask for one of these"):
        slice_checkpoint(tmp_path / "small", 4, tmp_path / "other")
    flip("plane-2.safetensors")(out)
    with pytest.raises(ElastiqError, match=r"plane-2\.safetensors: altered"):
        slice_checkpoint(out, 3, tmp_path / "altered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def test_recipe_and_missing_index(out: Path) -> None:
    (out / "model.safetensors.index.json").unlink()
    use(out)
    assert CheckpointReader(out).recipe.levels == (2, 3, 4, 6, 8)
    edit(out / "recipe.json", lambda data: data["solver"].update(name="magic"))
    with pytest.raises(ElastiqError, match="solver: unknown name 'magic'"):
        _ = CheckpointReader(out).recipe


def test_the_reader_of_the_documentation(original: Path, tmp_path: Path) -> None:
    """The numpy program of docs/checkpoint-format.md reads every matrix at every width."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(program, scope)
    for output, levels, symmetric in (
        (original, (2, 3, 4, 6, 8), False),
        (write_small(tmp_path / "symmetric", (3, 5), True), (3, 5), True),
    ):
        for unit in ("block-00000", "block-00001", "embeddings"):
            for site, weight in small_unit(unit, levels, symmetric).items():
                for bits in range(1, levels[-1] + 1):
                    values = torch.from_numpy(scope["read_matrix"](output, site.tensor, bits))
                    values = values if site.expert is None else values[site.expert]
                    assert torch.allclose(values, weight.dequantize(bits), rtol=1e-4, atol=1e-5)
