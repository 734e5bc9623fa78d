"""From a model directory to a checkpoint that runs: every family, every fault, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, MOE_FAMILIES, make_model
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError, recipes
from elastiq.checkpoint import CheckpointReader, CheckpointWriter
from elastiq.core import Site, Stats
from elastiq.inference.loading import bits_per_weight
from elastiq.models import ModelSource, build_skeleton, discover
from elastiq.pipeline.planning import plan
from elastiq.pipeline.run import quantize, quantize_matrix
from elastiq.pipeline.stream import BlockStream
from elastiq.pipeline.tuning import ANSWER_BYTES
from elastiq.runtime import nested_matrices
from elastiq.token_weights import BlockOutput
from elastiq.tuners import ScaleTuning

quantize_module = sys.modules["elastiq.pipeline.run"]
IDS = torch.randint(1, 250, (8, 32), generator=torch.Generator().manual_seed(0))
RECIPE = recipes.nested((2, 4, 8), 32)


def digests(path: Path) -> dict[str, str]:
    return {name: row["sha256"] for name, row in json.loads((path / "checksums.json").read_text())["files"].items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:2]).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_at_every_width(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model(family)
    summary = quantize(source, tmp_path / "out", RECIPE, IDS)
    full = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    distances = []
    for bits in range(1, 9):
        model = elastiq.load(tmp_path / "out", bits=bits)
        assert type(model).__name__ in json.loads((source / "config.json").read_text())["architectures"]
        distances.append(float((logits(model) - full).norm() / full.norm()))
    # A router that chooses another expert makes a jump, however near the weights are.
    assert distances[7] < (0.3 if family in MOE_FAMILIES else 0.1)
    assert distances[7] < distances[3] < distances[1], "the wider, the nearer"
    assert summary.matrices > 0 and summary.levels[8]["error"] < summary.levels[4]["error"] < summary.levels[2]["error"]


def test_generate_and_switch_live(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS)
    model = elastiq.load(tmp_path / "out", bits=2, max_bits=8)
    low = logits(model)
    elastiq.set_bits(model, 8)
    assert torch.equal(logits(model), logits(elastiq.load(tmp_path / "out", bits=8))) and not torch.equal(
        low, logits(model)
    )
    elastiq.set_bits(model, 2)
    assert torch.equal(logits(model), low)
    assert model.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False, eos_token_id=None).shape == (1, 9)
    assert bits_per_weight(model) == pytest.approx(2 + 32 / 32)


@pytest.mark.parametrize("recipe", [recipes.nested, recipes.gptq, recipes.rtn])
def test_same_input_same_bytes(
    recipe: Callable[..., elastiq.Recipe], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        quantize(tiny_model("llama"), tmp_path / name, recipe((2, 4), 32), IDS)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.parametrize(
    "options", [{"embeddings": True}, {"inputs": "quantized"}, {"token_weights": None}, {"symmetric": True}]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_options(family: str, options: dict[str, object], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model(family)
    quantize(source, tmp_path / "out", recipes.nested((2, 8), 32, **options), IDS)  # type: ignore[arg-type]
    full = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    assert float((logits(elastiq.load(tmp_path / "out", bits=8)) - full).norm() / full.norm()) < (
        0.4 if family in MOE_FAMILIES else 0.15
    )
    names = {row["name"] for row in CheckpointReader(tmp_path / "out").table}
    assert ("model.embed_tokens" in names) == bool(options.get("embeddings"))


def test_one_level_is_an_ordinary_checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    summary = quantize(tiny_model("llama"), tmp_path / "out", recipes.gptq((4,), 64), IDS)
    assert list(summary.levels) == [4] and CheckpointReader(tmp_path / "out").available == (4,)
    with pytest.raises(ElastiqError, match="3"):
        elastiq.load(tmp_path / "out", bits=3)


def test_rows_of_no_whole_bytes_are_counted_as_written(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "odd", intermediate_size=100)
    quantize(source, tmp_path / "out", recipes.rtn((2, 3), 32), IDS)
    reader, arrays = CheckpointReader(tmp_path / "out"), load_file(tmp_path / "out" / "plane-1.safetensors")
    for row in reader.table:
        planes = load_file(tmp_path / "out" / "plane-2.safetensors")[f"{row['name']}.plane_2"].nbytes
        own = {n: a.nbytes for n, a in arrays.items() if n.startswith(f"{row['name']}.")}
        assert row["levels"]["2"]["num_bits"] == 8 * (planes + sum(own.values()))


def test_a_table_has_no_width_below_its_lowest(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "source")
    quantize(source, tmp_path / "out", recipes.any_precision((2, 3)), IDS)
    model = elastiq.load(tmp_path / "out", 2)
    with pytest.raises(ElastiqError, match="it can be read at 2 or 3 bits, not 1"):
        elastiq.load(tmp_path / "out", 1)
    with pytest.raises(ElastiqError, match="2 or 3 bits"):
        elastiq.set_bits(model, 1)
    assert torch.isfinite(logits(model)).all()


def test_counted_bits_are_the_written_ones(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """3 bits cost 3.5 at group size 64, and that is what the arrays in the files take."""
    source = make_model("llama", tmp_path / "wide", hidden_size=128, intermediate_size=192)
    summary = quantize(source, tmp_path / "out", recipes.nested((3, 8), 64), IDS)
    assert summary.levels[3]["bits_per_weight"] == 3.5
    weights, stored = 0, 0
    for plane in (1, 2, 3):
        arrays = load_file(tmp_path / "out" / f"plane-{plane}.safetensors")
        weights = sum(8 * a.numel() for n, a in arrays.items() if a.dtype == torch.uint8)
        stored += sum(8 * a.numel() * a.element_size() for a in arrays.values())
    assert stored / weights == 3.5


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_an_expert_that_no_token_reached_is_rounded_and_reported(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = quantize(tiny_model(family), tmp_path / "out", RECIPE, torch.full((1, 4), 7))
    assert summary.fallbacks and all(".experts." in name for name in summary.fallbacks)
    assert f"{summary.fallbacks[0]}: rounded to nearest: only" in caplog.text
    rows = {row["name"]: row for row in CheckpointReader(tmp_path / "out").table}
    assert rows[summary.fallbacks[0]]["fallback"] and rows[summary.fallbacks[0]]["tokens"] < 4
    assert torch.isfinite(logits(elastiq.load(tmp_path / "out", bits=2))).all()


def test_the_plan_is_what_happens(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    before = sorted(tmp_path.rglob("*"))
    planned = plan(source, RECIPE, num_samples=8, seq_len=32)
    assert sorted(tmp_path.rglob("*")) == before, "a dry run writes nothing"
    tuned = plan(source, replace(RECIPE, tuner=ScaleTuning()), num_samples=8, seq_len=32)
    assert tuned.disk == planned.disk + ScaleTuning().windows * 32 * ANSWER_BYTES
    done = quantize(source, tmp_path / "out", RECIPE, IDS)
    for level in RECIPE.levels:
        assert planned.levels[level]["bits_per_weight"] == done.levels[level]["bits_per_weight"]
        assert planned.levels[level]["bytes_in_memory"] == done.levels[level]["bytes_in_memory"]
    assert {row["name"] for row in planned.matrices} == {
        row["name"] for row in CheckpointReader(tmp_path / "out").table
    }


def test_a_finished_directory_is_left_alone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS).already_finished
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


SCRIPT = """
import sys, torch, elastiq
from elastiq import recipes
torch.set_num_threads(1)
ids = torch.randint(1, 250, (8, 32), generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
elastiq.quantize(sys.argv[1], sys.argv[2], recipes.nested((2, 4, 8), 32), ids,
                 progress=lambda what, done, total: print(what, done, flush=True))
"""


def test_killed_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    """SIGKILL in the middle of a block, again and again; the finished blocks stay, and the bytes are the same."""
    source = make_model("llama", tmp_path / "model", num_hidden_layers=4)
    quantize(source, tmp_path / "whole", RECIPE, IDS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    output = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(source), str(output)]
    kills = 0
    for stop_at in ("solving block-00001 3", "quantizing blocks 3", "writing the checkpoint 0"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == stop_at:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
        assert process.returncode == -signal.SIGKILL
        assert not output.exists(), "nothing half-written is taken for whole"
        assert list((tmp_path / "out.partial" / "units").glob("*.safetensors"))
    assert kills == 3
    summary = quantize(source, output, RECIPE, IDS)
    assert summary.resumed_blocks == 4 and not (tmp_path / "out.partial").exists()
    assert digests(output) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"recipe": recipes.nested((2, 4, 8), 64)}, "recipe.format.group_size was 32, is 64"),
        ({"recipe": recipes.nested((2, 4, 8), 32, passes=1)}, "recipe.solver.passes was 4, is 1"),
        ({"calibration": IDS.flip(0)}, "calibration text has changed"),
        ({"model": "qwen2"}, "has changed"),
    ],
)
def test_a_changed_run_is_refused(
    change: dict[str, object], sentence: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "quantizing blocks" and done == 1:
            raise KeyboardInterrupt

    arguments = {"model": "llama", "recipe": RECIPE, "calibration": IDS}
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS, progress=stop)
    arguments |= change  # type: ignore[assignment]
    model = tiny_model(str(arguments.pop("model")))
    with pytest.raises(ElastiqError, match=sentence):
        quantize(model, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    quantize(model, tmp_path / "out", **arguments, restart=True)  # type: ignore[arg-type]
    assert (tmp_path / "out" / "checksums.json").exists()


def test_full_disk(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ElastiqError, match=r"GB of free disk and there are 0\.00"):
        quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_a_run_has_written_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointWriter(tmp_path / "out", {}) as writer:
        writer.write_side_file("answers", lambda path: path.write_bytes(bytes(1 << 20)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    quantize_module._check_disk(tmp_path / "out", 1000 + (1 << 20))
    with pytest.raises(ElastiqError, match=r"the run needs 0\.01 GB of free disk and there are 0\.00"):
        quantize_module._check_disk(tmp_path / "out", 10 << 20)


def test_places_and_generation_settings_are_looked_at_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("llama", tmp_path / "model")
    (source / "generation_config.json").write_text('{"max_new_tokens": ')
    monkeypatch.setattr(quantize_module, "calibration_ids", None)  # the first thing that takes time
    with pytest.raises(ElastiqError, match=r"generation_config\.json: transformers cannot read it \(.*remove it"):
        quantize(source, tmp_path / "out", RECIPE, IDS)
    for value, said in (('"</s>"', "'</s>'"), ('[1, "</s>"]', r"\[1, '</s>'\]"), ("true", "True"), ("1.5", r"1\.5")):
        (source / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
        with pytest.raises(
            ElastiqError, match=rf"generation_config\.json: eos_token_id is {said}, and tokens are whole"
        ):
            quantize(source, tmp_path / "out", RECIPE, IDS)
    nested = tmp_path / "nested"
    nested.mkdir()
    for name in ("checksums.json", "base.safetensors"):
        (nested / name).touch()
    with pytest.raises(ElastiqError, match=f"out: lies inside the checkpoint {nested}"):
        quantize(tmp_path / "nothing", nested / "out", RECIPE, IDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "nested"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ElastiqError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize(source, tmp_path / "out", RECIPE, IDS)
    assert not (tmp_path / "out").exists()


def test_truncated_shard(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "model")
    content = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ElastiqError, match=r"model\.safetensors"):
        quantize(source, tmp_path / "out", RECIPE, IDS)
    assert not (tmp_path / "out").exists()


def test_short_text_and_foreign_output(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match="less than one window of 512"):
        quantize(tiny_model("llama"), tmp_path / "out", RECIPE, ["too short"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ElastiqError, match="mine"):
        quantize(tiny_model("llama"), tmp_path / "mine", RECIPE, IDS, restart=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


MEMORY = """
import re, sys, torch, elastiq
from pathlib import Path
from elastiq import recipes
torch.set_num_threads(1)
ids = torch.randint(1, 250, (4, 64), generator=torch.Generator().manual_seed(0))
def tell(what, done, total):
    if what == "quantizing blocks":
        status = Path("/proc/self/status").read_text()
        print(*(re.search(name + r":\\s+(\\d+)", status).group(1) for name in ("RssAnon", "VmHWM")), flush=True)
elastiq.quantize(sys.argv[1], sys.argv[2], recipes.nested((2, 4), 64, passes=0, refits=0), ids, progress=tell)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_is_flat_over_blocks(tmp_path: Path) -> None:
    """Once warm, nine further blocks of 7 MB (in float32) leave nothing behind, and the peak does not follow them."""
    source = make_model("llama", tmp_path / "model", num_hidden_layers=12, hidden_size=384, intermediate_size=1024)
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "out")]
    # One heap, as what lies free in those of helper threads would be counted too.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    held, peak = zip(*([1024 * int(x) for x in line.split()] for line in output.splitlines()), strict=True)
    block = 4 * (4 * 384 * 384 + 3 * 384 * 1024)
    assert held[12] - held[3] < block / 2, f"{held}"
    assert peak[12] - peak[3] < 3 * block, f"{peak}"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_arithmetic_in_bfloat16_does_not_round_the_weights(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = ModelSource(tiny_model(family))
    model = build_skeleton(source, torch.bfloat16)
    layout = discover(model)
    needs = frozenset({"hessian"})
    coarse = BlockStream(model, source, layout, IDS, needs, torch.bfloat16, token_weights=BlockOutput())
    fine_model = build_skeleton(source, torch.float32)
    fine = BlockStream(fine_model, source, layout, IDS, frozenset({"hessian"}), token_weights=BlockOutput())
    for block in range(len(layout.blocks)):
        weights, expected = coarse.weights(block), fine.weights(block)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        for stream in (coarse, fine):
            stream.collect(block)
            stream.advance(block)


def test_quantized_inputs_are_those_of_the_top_level(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is calibrated on what the blocks before it answer at 8 bits, not at 2."""
    given: dict[str, torch.Tensor] = {}
    advance = BlockStream.advance

    def noted(stream: BlockStream, block: int, replaced: dict[str, torch.Tensor] | None = None) -> None:
        given.update(replaced or {})
        advance(stream, block, replaced)

    monkeypatch.setattr(BlockStream, "advance", noted)
    quantize(tiny_model("llama"), tmp_path / "out", recipes.nested((2, 8), 32, inputs="quantized"), IDS)
    top, low = (nested_matrices(elastiq.load(tmp_path / "out", bits)) for bits in (8, 2))
    assert given.keys() == top.keys()
    for name, weight in given.items():
        torch.testing.assert_close(weight, top[name].dense(), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(weight, low[name].dense(), rtol=1e-2)


def test_energies_of_the_level_table_are_per_row_and_token() -> None:
    """The weight of a token is a squared norm over all outputs of a matrix, so that the sum over its rows says what
    that many rows would move: a matrix of the same rows twice has the same energy."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 48, generator=generator), torch.randn(24, 48, generator=generator)
    counts = torch.rand(400, generator=generator) + 0.5
    stats = Stats.empty(48)
    stats.update(x, counts)
    for rows in (weight, torch.cat([weight, weight])):
        site = Site("m", "linear", tuple(rows.shape), 0, "m")
        _, row = quantize_matrix(site, rows, stats, recipes.rtn((4,), 16), block_energy=7.0)
        moved = (counts[:, None] * (x.double() @ weight.double().T).square()).sum() / (400 * 24 * 7.0)
        assert row["energy"] == pytest.approx(float(moved), rel=1e-4)
