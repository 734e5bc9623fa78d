"""Sensitivities that run the model, and maps that are measured before they are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from tiny import make_model, make_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import elastiq
import elastiq.measure.evidence as evidence_module
import elastiq.measure.sensitivity as module
from elastiq.allocate import Budget, allocate, read_stored
from elastiq.checkpoint import CheckpointReader
from elastiq.core import ElastiqError, Evidence, Step
from elastiq.measure import Bench, allocate_measured, latency_table, measure_sensitivity
from elastiq.measure.bench import block_name
from elastiq.measure.evidence import gather
from elastiq.measure.prefix import Prefix
from elastiq.sensitivity import SampledFisher

TEXT = "".join(f"{i}: the quick brown fox, {i * 7919 % 1000} lazy dogs;\n" for i in range(40))
LEVELS = (2, 4, 8)
SMALL = {"window": 24, "num_windows": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(TEXT)
    return file


def make(family: str, tiny_model: Callable[[str], Path], output: Path, **options: Any) -> Path:
    source = tiny_model(family)
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output, levels=LEVELS, **options)
    return output


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return make("llama", tiny_model, tmp_path / "nested")


def test_damage_is_that_of_the_loaded_model(checkpoint: Path, text: Path) -> None:
    """Against a naive twin: two loaded models, one as widths say, in double precision."""
    bench = Bench(checkpoint, text, **SMALL)
    name = "model.layers.1.mlp.down_proj"
    measured = bench.damage({name: 2})
    full, low = elastiq.load(checkpoint), elastiq.load(checkpoint, bits={name: 2})
    with torch.no_grad():
        p, q = (F.log_softmax(m(bench.ids).logits[:, :-1].double(), dim=-1) for m in (full, low))
    targets = bench.ids[:, 1:, None]
    assert measured.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert measured.nll == pytest.approx(float((p - q).gather(2, targets).mean()), rel=1e-3, abs=1e-6)
    assert bench.damage({}).kl == pytest.approx(0.0, abs=1e-9)
    assert bench.damage({name: 2}) == measured, "lowering and raising again leaves no trace"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_blocks_that_did_not_change_are_not_run_again(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same damage to the last bit, whichever block was lowered before."""
    output = make(family, tiny_model, tmp_path / family)
    bench = Bench(output, text, **SMALL)
    last = max(bench.blocks.values())
    names = [[name for name, block in bench.blocks.items() if block == index][-1] for index in range(last + 1)]
    order = [*names, *reversed(names)]
    short = [bench.damage({name: 2}) for name in order]
    runs: list[int] = []
    inside = next(bench.model.get_submodule(str(block_name(names[0], 0))).children())
    inside.register_forward_hook(lambda *_: runs.append(0))
    assert bench.damage({names[-1]: 2}) == short[last] and not runs, "what the first block answers is known"
    monkeypatch.setattr(Bench, "_unchanged_blocks", lambda *_: 0)
    assert [bench.damage({name: 2}) for name in order] == short and all(damage.kl > 0 for damage in short)


def test_a_model_whose_blocks_share_more_than_answers_is_run_whole() -> None:
    kept: list[torch.Tensor] = []

    class First(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(x)
            return super().forward(x)

    class Sharing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([First(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            kept.clear()
            hidden = self.blocks[0](F.one_hot(input_ids, 4).float())
            return SimpleNamespace(logits=self.blocks[1](hidden) + kept[0])

    model = Sharing()
    assert not Prefix(model, list(model.blocks), torch.arange(4)[None]).usable


def test_the_reference_may_be_the_full_model(
    checkpoint: Path, text: Path, tiny_model: Callable[[str], Path]
) -> None:
    bench = Bench(checkpoint, text, against=tiny_model("llama"), **SMALL)
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
        p = F.log_softmax(full(bench.ids).logits[:, :-1].double(), dim=-1)
        q = F.log_softmax(elastiq.load(checkpoint)(bench.ids).logits[:, :-1].double(), dim=-1)
    assert bench.damage({}).kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_every_method_measures_and_is_kept(
    family: str, tiny_model: Callable[[str], Path], tmp_path: Path, text: Path
) -> None:
    output = make(family, tiny_model, tmp_path / family)
    for name in sorted(Step.registry["sensitivity"]):
        measured = measure_sensitivity(output, name, text, **SMALL)
        assert {m for group, _ in measured.groups for m in group} == CheckpointReader(output).manifest.matrices.keys()
        found = allocate(output, Budget(bits=3.5), sensitivity=name)
        assert found.sensitivity == name and found.sizes["mean_bits"] <= 3.5
    assert not (output / "sensitivity.partial.json").exists()
    assert set(read_stored(CheckpointReader(output)).uniform) == set(LEVELS)


def test_a_checkpoint_without_errors_is_measured_end_to_end(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointReader, "check", lambda reader, name: None)
    table = json.loads((checkpoint / "levels.json").read_text())
    table["matrices"][1]["levels"]["4"]["error"] = None
    (checkpoint / "levels.json").write_text(json.dumps(table))
    for name in ("output-error", "weight-outliers"):
        with pytest.raises(ElastiqError, match=f"sensitivity {name}: levels.json has no output error of .* at 4 bits"):
            measure_sensitivity(checkpoint, name, text, **SMALL)
    measure_sensitivity(checkpoint, "kl", text, **SMALL)
    assert allocate(checkpoint, Budget(bits=3.5)).sensitivity == "kl"


def test_gradients_equal_those_of_finite_differences(checkpoint: Path, text: Path) -> None:
    bench = Bench(checkpoint, text, window=24, num_windows=1)
    name = "model.layers.0.mlp.up_proj"
    known = {name: Evidence(levels=LEVELS, errors=dict.fromkeys(LEVELS, 1.0))}
    needs = frozenset({"gradient", "fisher", "trace", "eigenvalue"})
    found = gather(bench, known, {name: 0}, needs, lambda *_: None)[name]
    assert found.gradient is not None and found.fisher is not None
    torch.testing.assert_close(found.fisher, found.gradient.square())
    assert found.eigenvalue == pytest.approx(float(found.fisher.sum()), rel=1e-3), "one window, one direction"
    direction = found.gradient / found.gradient.norm()
    parameter = bench.parameter(name)
    assert parameter is not None and not parameter.requires_grad
    losses = []
    for step in (-1e-2, 1e-2):
        with torch.no_grad():
            parameter += step * direction
            logits = bench.model(bench.ids).logits[0, :-1].double()
            losses.append(float(F.cross_entropy(logits, bench.ids[0, 1:])))
            parameter -= step * direction
    assert (losses[1] - losses[0]) / 2e-2 == pytest.approx(float(found.gradient.norm()), rel=1e-2)


def test_drawn_labels_give_the_second_order_of_kl(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the KL divergence of a change a hundred times smaller; the rows' shares against a loop of draws."""
    monkeypatch.setattr(evidence_module, "_DRAWS", 600)
    bench = Bench(checkpoint, text, window=12, num_windows=2)
    name = "model.layers.1.mlp.down_proj"
    parameter = bench.parameter(name)
    assert parameter is not None
    change = bench.decode(name, 2) - bench.decode(name, 8)
    known = {name: Evidence(levels=LEVELS)}
    found = gather(bench, known, {name: 1}, frozenset({"weight", "slopes"}), lambda *_: None)[name]
    assert found.slopes is not None and found.drawn is not None and not parameter.requires_grad
    step = 1e-2
    with torch.no_grad():
        p = F.log_softmax(bench.model(bench.ids).logits[:, :-1].double(), dim=-1)
        parameter += step * change
        q = F.log_softmax(bench.model(bench.ids).logits[:, :-1].double(), dim=-1)
        parameter -= step * change
    expected = float((p.exp() * (p - q)).sum(-1).mean()) / step**2
    assert SampledFisher().measure(found)[2] == pytest.approx(expected, rel=0.2)
    assert float(found.slopes[8].abs().max()) == 0.0
    assert found.drawn.shape == change.shape and bool((found.drawn >= 0).all())


def test_a_killed_measurement_resumes(checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_sensitivity(checkpoint, "kl", text, **SMALL)
    (checkpoint / "sensitivity.json").unlink()
    calls: list[tuple[str, ...]] = []
    lower = module._lower

    def dying(bench: Bench, group: tuple[str, ...], level: int) -> Any:
        calls.append(group)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return lower(bench, group, level)

    monkeypatch.setattr(module, "_lower", dying)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(checkpoint, "kl", text, **SMALL)
    assert len(set(calls[:6])) == 2, "three levels each"
    again = measure_sensitivity(checkpoint, "kl", text, **SMALL)
    assert again.groups == whole.groups and not set(calls[:6]) & set(calls[8:])
    count = len(calls)
    assert measure_sensitivity(checkpoint, "kl", text, **SMALL) == again and len(calls) == count


def test_untied_measurements_and_their_limits(checkpoint: Path, text: Path) -> None:
    measure_sensitivity(checkpoint, "kl", text, **SMALL)
    with pytest.raises(ElastiqError, match="were measured together; measure again with --untie"):
        allocate(checkpoint, Budget(bits=3.5), untie=True)
    measure_sensitivity(checkpoint, "kl", text, untie=True, **SMALL)
    assert allocate(checkpoint, Budget(bits=3.5), untie=True).sensitivity == "kl"
    with pytest.raises(ElastiqError, match="give a text with --text"):
        measure_sensitivity(checkpoint, "kl")


def test_verified_maps_are_not_worse_than_uniform(checkpoint: Path, text: Path) -> None:
    bench = Bench(checkpoint, text, **SMALL)
    verdict = allocate_measured(bench, Budget(bits=4.0), allocator="random", sensitivity="output-error")
    assert verdict.uniform is not None and verdict.measured.kl <= verdict.uniform.kl
    assert bench.damage(verdict.allocation.level_map.widths).kl == pytest.approx(verdict.measured.kl)
    assert any(note.startswith("measured,") for note in verdict.allocation.notes)
    evolved = allocate_measured(bench, Budget(bits=4.0), allocator="evolutionary", sensitivity="output-error")
    assert evolved.measured.kl <= verdict.measured.kl


def test_damage_is_bounded_as_measured(checkpoint: Path, text: Path) -> None:
    measure_sensitivity(checkpoint, "kl", text, **SMALL)
    bench = Bench(checkpoint, text, **SMALL)
    limit = 0.5 * bench.damage(dict.fromkeys(bench.nested, 4)).kl
    verdict = allocate_measured(bench, Budget(), max_kl=limit)
    assert verdict.measured.kl <= limit
    assert verdict.allocation.sizes["mean_bits"] < 8


def test_latency_budgets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = latency_table(checkpoint)
    (file,) = (tmp_path / "cache" / "elastiq" / "latency").iterdir()
    stamp = file.stat().st_mtime_ns
    again = latency_table(checkpoint)
    assert file.stat().st_mtime_ns == stamp and (again.costs["latency"] == table.costs["latency"]).all()
    seconds = table.costs["latency"].sum(axis=0) + table.base_seconds
    limit = float(seconds[0] + seconds[-1]) / 2
    found = allocate(checkpoint, Budget(latency=limit, bits=7.5), table=table)
    assert found.sizes["seconds_per_token"] <= limit
    with pytest.raises(ElastiqError, match=r"less than the smallest map, which takes .* ms"):
        allocate(checkpoint, Budget(latency=1e-9), table=table)
    with pytest.raises(ElastiqError, match="a latency needs measured times"):
        allocate(checkpoint, Budget(latency=1.0))


def test_what_the_tokenizer_puts_before_a_text_is_context_and_not_counted(text: Path, tmp_path: Path) -> None:
    """Damage and gradients of the tokens of the text alone, against whole logits of the loaded model."""
    source, output = make_model("llama", tmp_path / "model"), tmp_path / "nested"
    make_tokenizer("</s> <s> $A").save_pretrained(source)
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output, levels=LEVELS)
    bench, name = Bench(output, text, **SMALL), "model.layers.1.mlp.down_proj"
    assert bench.ids[:, :2].tolist() == [[257, 256]] * 2 and bench.text["beginning"] == [257, 256]
    full, low = elastiq.load(output), elastiq.load(output, bits={name: 2})
    with torch.no_grad():
        p, q = (F.log_softmax(m(bench.ids).logits[:, 1:-1].double(), dim=-1) for m in (full, low))
    targets, measured = bench.ids[:, 2:, None], bench.damage({name: 2})
    assert measured.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert measured.nll == pytest.approx(float((p.gather(2, targets) - q.gather(2, targets)).mean()), rel=1e-3)
    weight = bench.parameter(name)
    with bench.widest(), torch.enable_grad():
        weight.requires_grad_(True)
        logits = bench.model(bench.ids).logits[:, 1:-1].reshape(-1, 260)
        (expected,) = torch.autograd.grad(F.cross_entropy(logits, targets.flatten()), [weight])
        weight.requires_grad_(False)
    known = {name: Evidence(LEVELS)}
    found = gather(bench, known, bench.blocks, frozenset({"gradient"}), lambda *a: None)[name].gradient
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_sensitivity_says_how_its_windows_began(text: Path, tmp_path: Path) -> None:
    source, output = make_model("llama", tmp_path / "model"), tmp_path / "nested"
    make_tokenizer("<s> $A").save_pretrained(source)
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output, levels=LEVELS)
    with_bos = measure_sensitivity(output, "kl", text, **SMALL)
    without = measure_sensitivity(output, "kl", text, bos=False, **SMALL)
    assert with_bos.text["beginning"] == [256] and "beginning" not in without.text
    assert with_bos.groups != without.groups


def test_windows_the_model_cannot_read_are_refused(text: Path, tmp_path: Path) -> None:
    source, output = make_model("gpt2", tmp_path / "model", vocab_size=70, n_positions=16), tmp_path / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output, levels=LEVELS)
    with pytest.raises(ElastiqError, match="window=24 exceeds the model's context of 16; use --window 16"):
        Bench(output, text, **SMALL)
    with pytest.raises(ElastiqError, match=r"sample\.txt: the token id [0-9]+ is not among the 70 rows of the model's"):
        measure_sensitivity(output, "kl", text, window=16, num_windows=1)
