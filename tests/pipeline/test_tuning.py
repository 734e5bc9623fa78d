"""Levels tuned against the full model: the loss, the files, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError, recipes
from elastiq.allocate import Budget, allocate
from elastiq.checkpoint import CheckpointReader
from elastiq.compensators import LowRankError
from elastiq.core import Transform
from elastiq.models import ModelSource, build_skeleton, discover, load_module, load_tokenizer
from elastiq.pipeline import tuning
from elastiq.pipeline.planning import plan
from elastiq.pipeline.run import quantize
from elastiq.runtime import nested_matrices
from elastiq.splits import SensitiveWeights
from elastiq.text.calibration import calibration_ids, tuning_ids
from elastiq.transforms import ActivationAware, RandomHadamard
from elastiq.tuners import CoDistillation, ScaleTuning

IDS = torch.randint(1, 250, (8, 32), generator=torch.Generator().manual_seed(0))
TEXT = torch.randint(1, 250, (20, 32), generator=torch.Generator().manual_seed(1))
UNTUNED = recipes.rtn((2, 4), 32)
RECIPE = replace(UNTUNED, tuner=ScaleTuning(steps=12, batch=4, rate=2e-2, holdout=4))


def digests(path: Path) -> dict[str, str]:
    return {name: row["sha256"] for name, row in json.loads((path / "checksums.json").read_text())["files"].items()}


def divergence(checkpoint: Path, source: Path, bits: int) -> float:
    """Mean KL from the 16-bit model on the text that was tuned on, by the plain formula."""
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = elastiq.load(checkpoint, bits=bits)
    with torch.no_grad():
        p, q = (m(TEXT).logits.double().log_softmax(-1).flatten(0, 1) for m in (full, model))
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("known", [40, 7])
def test_divergence_and_its_gradient(known: int) -> None:
    """All tokens known: KL itself; some known: KL of the distributions in which the others are one event."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(9, 40, generator=generator)).requires_grad_()
    log_p = (2 * torch.randn(9, 40, generator=generator)).log_softmax(-1)
    best, tokens = log_p.topk(known)
    loss = tuning.Divergence.apply(logits, tokens, best)
    (3 * loss).backward()
    twin = logits.detach().double().requires_grad_()
    q, p = twin.softmax(-1).gather(1, tokens), best.double().exp()
    expected = (p * (p / q).log()).sum(1)
    if known < 40:
        expected = expected + (1 - p.sum(1)) * ((1 - p.sum(1)) / (1 - q.sum(1))).log()
    (3 * expected.mean()).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach().mean()), abs=1e-5)
    assert logits.grad is not None and twin.grad is not None
    assert torch.allclose(logits.grad.double(), twin.grad, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma3"])
def test_every_kind_of_matrix(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Linear layers, transposed ones, fused experts and a tied embedding table; only the tuned scales differ."""
    source = tiny_model(family)
    recipe = replace(RECIPE, embeddings=family == "gemma3")
    quantize(source, tmp_path / "before", replace(recipe, tuner=None), IDS)
    summary = quantize(source, tmp_path / "after", recipe, IDS, tuning=TEXT, dtype=torch.float32)
    assert summary.tuning == CheckpointReader(tmp_path / "after").info["tuning"]["loss"]
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    for bits in (2, 4):
        losses = summary.tuning[str(bits)]
        assert losses["after"] <= losses["before"]
        if losses["after"] < losses["before"]:
            assert divergence(tmp_path / "after", source, bits) < divergence(tmp_path / "before", source, bits)
    assert summary.tuning["2"]["after"] < summary.tuning["2"]["before"]
    for plane in range(1, 5):
        name = f"plane-{plane}.safetensors"
        old, new = load_file(tmp_path / "before" / name), load_file(tmp_path / "after" / name)
        changed = {key for key in old if not torch.equal(old[key], new[key])}
        assert old.keys() == new.keys() and all(key.endswith(("_2", "_4")) and "plane" not in key for key in changed)
    assert before["base.safetensors"] == after["base.safetensors"]
    assert all(row["error"] is None for row in summary.levels.values()), "those of the untuned scales are stale"
    with pytest.raises(ElastiqError, match=r"levels.json has no output error of .* at 2 bits .*; run ela"):
        allocate(tmp_path / "after", Budget(bits=3.0))


CASES = ("block_tuner llama", "block_tuner gpt2", "block_tuner qwen3_moe", "tuner llama", "tuner gpt2")


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_together(case: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Block by block and end to end: planes change, the file reads as the tuner left it, the run may be stopped."""
    slot, family = case.split()
    source, tuner = tiny_model(family), CoDistillation(steps=8, batch=2, rate=2e-2, scale_rate=5e-3, holdout=2)
    recipe = replace(UNTUNED, **{slot: tuner})
    quantize(source, tmp_path / "before", UNTUNED, TEXT)
    summary = quantize(source, tmp_path / "after", recipe, TEXT, tuning=TEXT, dtype=torch.float32)
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    assert before["base.safetensors"] == after["base.safetensors"]
    assert before["plane-4.safetensors"] != after["plane-4.safetensors"]
    left = [divergence(tmp_path / "after", source, r) / divergence(tmp_path / "before", source, r) for r in (2, 4)]
    assert sum(left) < 2
    assert slot == "block_tuner" or set(summary.tuning) == {"2", "4"}
    errors = [[row["levels"][r]["error"] for row in CheckpointReader(tmp_path / "after").table] for r in ("2", "4")]
    assert all((error is None) == (slot == "tuner") for column in errors for error in column)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("tuning") and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe, TEXT, tuning=TEXT, dtype=torch.float32, progress=progress)
    quantize(source, tmp_path / "out", recipe, TEXT, tuning=TEXT, dtype=torch.float32)
    assert digests(tmp_path / "out") == after


@pytest.mark.parametrize("transform", [ActivationAware(), RandomHadamard()], ids=lambda step: step.name)
@pytest.mark.parametrize("slot", ["tuner", "block_tuner"])
def test_behind_folds_and_beside_other_terms(
    slot: str, transform: Transform, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Folds that the block before has taken over, folds that have stayed, single weights and a low rank."""
    source, tuner = tiny_model("llama"), ScaleTuning(steps=16, batch=4, rate=5e-3, holdout=4)
    untuned = replace(UNTUNED, transforms=(transform,), splits=(SensitiveWeights(),), compensators=(LowRankError(2),))
    quantize(source, tmp_path / "before", untuned, TEXT)
    quantize(source, tmp_path / "after", replace(untuned, **{slot: tuner}), TEXT, tuning=TEXT, dtype=torch.float32)
    matrices = nested_matrices(elastiq.load(tmp_path / "after")).values()
    kinds = {part.kind for matrix in matrices for part in matrix.stored.parts}
    assert {"sparse", "low-rank"} <= kinds and (transform.name == "awq") == ("hadamard" not in kinds)
    assert divergence(tmp_path / "after", source, 2) < divergence(tmp_path / "before", source, 2)
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    assert before["base.safetensors"] == after["base.safetensors"]
    for plane in range(1, 5):
        name = f"plane-{plane}.safetensors"
        old, new = load_file(tmp_path / "before" / name), load_file(tmp_path / "after" / name)
        changed = {key for key in old if not torch.equal(old[key], new[key])}
        assert old.keys() == new.keys() and all("scale_" in key or "zero_point_" in key for key in changed)


@pytest.mark.parametrize("slot", ["tuner", "block_tuner"])
def test_what_is_no_codes_is_refused_at_the_first_matrix(
    slot: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = replace(recipes.nf4(), **{slot: ScaleTuning()})
    with pytest.raises(ElastiqError, match=r"model.layers.0.*q_proj: a tuner works on nested integer codes; choose"):
        quantize(tiny_model("llama"), tmp_path / "out", recipe, IDS, tuning=TEXT)


def test_a_block_that_tuning_makes_worse_is_left_and_named(
    tiny_model: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, wild = tiny_model("llama"), ScaleTuning(steps=4, batch=2, rate=20.0, falloff=1.0, holdout=2)
    quantize(source, tmp_path / "before", UNTUNED, TEXT)
    assert not caplog.records
    quantize(source, tmp_path / "after", replace(UNTUNED, block_tuner=wild), TEXT)
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    assert all(before[f"plane-{plane}.safetensors"] == after[f"plane-{plane}.safetensors"] for plane in range(1, 5))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4 and told[0].endswith("at 2 bits gained nothing on the windows kept apart and was given up")


def test_blocks_computed_again_give_the_same_gradients(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = ModelSource(tiny_model("llama"))
    model = build_skeleton(source, torch.float32)
    layout = discover(model)
    load_module(model, "", source, torch.float32, "cpu")
    tuning._write_answers(tmp_path / "answers", model, TEXT, torch.float32, "cpu", lambda *_: None)
    weights = {site.name: model.get_submodule(site.name).weight.detach() * 0.9 for site in layout.sites}
    gradients = []
    for recomputed in ((), layout.blocks):
        objective = tuning.TextObjective(
            model, layout.sites, TEXT, tmp_path / "answers", torch.float32, "cpu", lambda _: None, recomputed
        )
        trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        second = objective.answers(lambda name: weights[name] * 0.8, [0, 3])
        objective.loss(trained.__getitem__, [0, 3], second).backward()
        gradients.append({name: weight.grad for name, weight in trained.items()})
    plain, again = gradients
    assert all(torch.allclose(plain[name], again[name], rtol=1e-5, atol=1e-9) for name in weights)
    assert all(bool(grad.abs().max() > 0) for grad in plain.values())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_bfloat16_arithmetic_also_helps(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "before", UNTUNED, IDS)
    quantize(tiny_model("llama"), tmp_path / "after", RECIPE, IDS, tuning=TEXT, dtype=torch.bfloat16)
    assert divergence(tmp_path / "after", tiny_model("llama"), 2) < divergence(
        tmp_path / "before", tiny_model("llama"), 2
    )


def test_stopped_and_resumed_is_byte_identical(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Stopped in every phase: finished blocks, answers and levels are not computed again; the bytes are the same."""
    source = tiny_model("llama")
    quantize(source, tmp_path / "whole", RECIPE, IDS, tuning=TEXT)
    output, seen = tmp_path / "out", []
    for stop in (("reading the full model's answers", 0), ("tuning 2 bits", 10), ("tuning 4 bits", 5)):

        def progress(what: str, done: int, total: int, stop: tuple[str, int] = stop) -> None:
            seen.append(what)
            if (what, done) == stop:
                raise KeyboardInterrupt

        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            quantize(source, output, RECIPE, IDS, tuning=TEXT, progress=progress)
        assert not output.exists()
    assert not {"quantizing blocks", "reading the full model's answers"} & set(seen), "kept from the runs before"
    assert [path.name for path in (tmp_path / "out.partial" / "tuned").glob("*.safetensors")] == ["2.safetensors"]
    quantize(source, output, RECIPE, IDS, tuning=TEXT)
    assert digests(output) == digests(tmp_path / "whole") and not (tmp_path / "out.partial").exists()


def test_a_dry_run_counts_the_tuning(tiny_model: Callable[[str], Path]) -> None:
    untuned = plan(tiny_model("llama"), UNTUNED, num_samples=8, seq_len=32)
    for slot in ("tuner", "block_tuner"):
        recipe = replace(UNTUNED, **{slot: ScaleTuning(steps=2000)})
        tuned = plan(tiny_model("llama"), recipe, num_samples=8, seq_len=32)
        assert tuned.peak_memory > 0 and tuned.seconds > untuned.seconds and tuned.levels == untuned.levels


def test_another_tuning_text_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS, tuning=TEXT)
    with pytest.raises(ElastiqError, match="the tuning text has changed"):
        quantize(tiny_model("llama"), tmp_path / "out", RECIPE, IDS, tuning=TEXT.flip(0))


def test_several_texts_share_equally(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    ids = tuning_ids(["a" * 500, "b" * 500, "c" * 500], None, tokenizer, 8, 16)
    (a,), (b,), (c,) = (tokenizer(letter)["input_ids"] for letter in "abc")
    assert ids[:, 0].tolist() == [a] * 3 + [b] * 3 + [c] * 2
    assert torch.equal(tuning_ids(IDS, ["other"], None, 4, 16), IDS[:4, :16])


def test_without_a_text_the_calibration_and_the_package_share(tiny_model: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(tiny_model("llama"))
    short = ["a" * 40, "b" * 460]  # members too short for a window of their own
    ids = tuning_ids(None, short, tokenizer, 8, 16)
    expected = (calibration_ids(short, tokenizer, 4, 16), calibration_ids(None, tokenizer, 4, 16))
    assert torch.equal(ids, torch.cat(expected))
    assert torch.equal(tuning_ids(None, None, tokenizer, 8, 16), calibration_ids(None, tokenizer, 8, 16))
    assert torch.equal(tuning_ids(None, IDS, tokenizer, 4, 16), IDS[:4, :16])


def test_wide_levels_are_tuned_in_full_precision() -> None:
    assert tuning.arithmetic("cpu", None, (8,)) == tuning.arithmetic("cpu", None, (2, 6)) == torch.float32
    assert tuning.arithmetic("cuda", None, (2, 4)) == torch.bfloat16
    assert tuning.arithmetic("cpu", torch.bfloat16, (8,)) == torch.bfloat16
