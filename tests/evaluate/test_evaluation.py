"""Perplexity, divergence and agreement against a naive twin."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastiq import recipes
from elastiq.checkpoint import CheckpointReader
from elastiq.core import ElastiqError, LevelMap
from elastiq.evaluate import evaluate, evaluation, level_sizes, megabytes, read_evaluations, row_name, scores
from elastiq.inference.loading import bytes_in_memory, load
from elastiq.measure import inspect_checkpoint
from elastiq.pipeline.run import quantize
from elastiq.report import write_report
from elastiq.runtime import nested_matrices

WINDOW, COUNT = 24, 5


def naive(model: nn.Module, full: nn.Module, ids: list[int]) -> dict[str, float]:
    """The same numbers from whole logits, one position after the other, in plain double precision."""
    nll, divergences, agreed = 0.0, [], 0
    for first in range(0, WINDOW * COUNT, WINDOW):
        window = torch.tensor([ids[first : first + WINDOW]])
        with torch.no_grad():
            q = model.double()(window).logits[0]
            p = full.double()(window).logits[0]
        for position in range(WINDOW - 1):
            probability_q = [math.exp(v) for v in (q[position] - q[position].logsumexp(0)).tolist()]
            probability_p = [math.exp(v) for v in (p[position] - p[position].logsumexp(0)).tolist()]
            nll -= math.log(probability_q[int(window[0, position + 1])])
            divergences.append(sum(a * math.log(a / b) for a, b in zip(probability_p, probability_q, strict=True)))
            best_p, best_q = probability_p.index(max(probability_p)), probability_q.index(max(probability_q))
            agreed += best_p == best_q
    divergences.sort()
    place = 0.99 * (len(divergences) - 1)
    below, part = int(place), place - int(place)
    return {
        "perplexity": math.exp(nll / len(divergences)),
        "kl_mean": sum(divergences) / len(divergences),
        "kl_p99": divergences[below] * (1 - part) + divergences[below + 1] * part,
        "kl_max": divergences[-1],
        "top1_agreement": agreed / len(divergences),
    }


@pytest.fixture(scope="module")
def result(random_checkpoint: Path, text_file: Path, tiny_model: Callable[[str], Path]) -> dict[str, Any]:
    source = tiny_model("llama")
    return evaluate(
        random_checkpoint, [2, 5, 8], text_file, against=source, window=WINDOW, num_windows=COUNT, save=False
    )


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_equals_naive_twin(
    bits: int, result: dict[str, Any], random_checkpoint: Path, text_file: Path, tiny_model: Callable[[str], Path]
) -> None:
    full = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_model("llama"))(text_file.read_text(), add_special_tokens=False)[
        "input_ids"
    ]
    expected = naive(load(random_checkpoint, bits, dtype=torch.float32), full, ids)
    row = next(row for row in result["levels"] if row["bits"] == bits)
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-4), key


def test_full_model_against_itself_has_no_divergence() -> None:
    logits, targets = torch.randn(40, 11), torch.randint(0, 11, (40,))
    own = scores.Scores("x")
    own.add(logits, targets, logits)
    row = own.to_dict()
    assert row["kl_mean"] == row["kl_p99"] == row["kl_max"] == 0.0
    assert row["top1_agreement"] == 1.0
    assert row["perplexity"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).exp().item())


def test_chunks_and_batches_do_not_matter(
    result: dict[str, Any],
    random_checkpoint: Path,
    text_file: Path,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scores, "_CHUNK", 3 * 260)
    monkeypatch.setattr(evaluation, "_MOST_WINDOWS", 2)
    source = tiny_model("llama")
    again = evaluate(
        random_checkpoint, [2, 5, 8], text_file, against=source, window=WINDOW, num_windows=COUNT, save=False
    )
    for row, other in zip(result["levels"], again["levels"], strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_result_says_what_was_done(result: dict[str, Any]) -> None:
    protocol = result["protocol"]
    assert protocol["words"] == (
        "sample.txt as one text, no special tokens, 5 non-overlapping windows of 24 tokens, 23 predictions each; "
        "float32 arithmetic"
    )
    assert (protocol["window"], protocol["num_windows"], protocol["predicted_tokens"]) == (24, 5, 115)
    assert [row["bits"] for row in result["levels"]] == [2, 5, 8]
    assert result["full"]["perplexity"] > 1
    assert "compiled code" in result["tokens"]
    json.dumps(result, allow_nan=False)


def test_without_full_model_the_fields_are_null(random_checkpoint: Path, text_file: Path) -> None:
    result = evaluate(random_checkpoint, None, text_file, window=WINDOW, num_windows=1, save=False)
    assert result["full"]["perplexity"] is None
    assert [row["bits"] for row in result["levels"]] == [2, 3, 4, 6, 8]
    for row in result["levels"]:
        assert row["kl_mean"] is row["kl_p99"] is row["kl_max"] is row["top1_agreement"] is None
        assert row["perplexity"] > 1


def test_progress_reaches_the_end(random_checkpoint: Path, text_file: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    evaluate(
        random_checkpoint,
        [2, 4],
        text_file,
        window=WINDOW,
        num_windows=3,
        save=False,
        progress=lambda *a: seen.append(a),
    )
    assert seen[0] == ("evaluating", 0, 6)
    assert seen[-1] == ("evaluating", 6, 6)


def test_sizes_are_counted(random_checkpoint: Path) -> None:
    reader = CheckpointReader(random_checkpoint)
    sizes = level_sizes(reader, [1, 3, 8])
    assert sizes[1]["bits_per_weight"] == pytest.approx(1 + 32 / 32)
    assert sizes[8]["bits_per_weight"] == pytest.approx(8 + 32 / 32)
    everything = sum(f.stat().st_size for f in random_checkpoint.iterdir())
    assert sizes[8]["bytes_on_disk"] == everything
    dropped = sum((random_checkpoint / f"plane-{p}.safetensors").stat().st_size for p in range(4, 9))
    assert sizes[3]["bytes_on_disk"] == everything - dropped
    for bits in (1, 3, 8):
        model = load(random_checkpoint, bits)
        rotary = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
        assert sizes[bits]["bytes_in_memory"] == bytes_in_memory(model) - rotary


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_memory_said_everywhere_is_what_a_loaded_model_holds(
    family: str, tiny_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """But for the few numbers that the model computes for itself and no file holds."""
    ids = torch.randint(1, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    done = quantize(tiny_model(family), tmp_path / "out", recipes.nested((2, 4)), ids)

    def held(dtype: torch.dtype) -> int:
        model = load(tmp_path / "out", 2, dtype=dtype)
        stored = *CheckpointReader(tmp_path / "out").base_specs, *nested_matrices(model)
        own = [b for n, b in model.named_buffers() if not n.startswith(stored)]
        return bytes_in_memory(model) - sum(b.nbytes for b in own)

    assert done.levels[2]["bytes_in_memory"] == held(torch.float32)
    assert inspect_checkpoint(tmp_path / "out")["widths"][1]["bytes_in_memory"] == held(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        result = evaluate(tmp_path / "out", [2], text_file, window=8, num_windows=1, dtype=dtype)
        assert result["levels"][0]["bytes_in_memory"] == held(dtype)
    shown = megabytes(held(torch.float32))
    assert f"| {shown} |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f">{shown}</td>" in write_report(tmp_path / "out").read_text(encoding="utf-8")


def test_results_are_kept_beside_the_checkpoint(
    random_checkpoint: Path, text_file: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "copy"
    shutil.copytree(random_checkpoint, checkpoint)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[100:], encoding="utf-8")
    source = tiny_model("llama")
    evaluate(checkpoint, [3], text_file, against=source, window=WINDOW, num_windows=2)
    evaluate(checkpoint, [2, 3], text_file, window=WINDOW, num_windows=2)
    evaluate(checkpoint, [2], other, window=WINDOW, num_windows=2)
    kept = json.loads((checkpoint / "evaluation.json").read_text())["evaluations"]
    assert [(e["protocol"]["text"], [r["bits"] for r in e["levels"]]) for e in kept] == [
        ("sample.txt", [2, 3]),
        ("other.txt", [2]),
    ]
    assert kept[0]["against"] == source.name
    assert kept[0]["full"]["perplexity"] > 1
    assert kept[0]["levels"][0]["kl_mean"] is None
    assert kept[0]["levels"][1]["kl_mean"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 4000}, "has 2.* tokens, fewer than one window of 4000; use a longer text or a smaller window"),
        ({"window": 300}, "window=300 exceeds the model's context of 256; use --window 256"),
        ({"window": 1}, "window=1 predicts nothing"),
        ({"num_windows": 0}, "num_windows=0 evaluates nothing"),
        ({"bits": [9]}, "can be read at 1 to 8 bits, not 9"),
        ({"text": "absent.txt"}, "absent.txt cannot be read"),
        ({"against": "absent/model/dir"}, "absent/model/dir"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, random_checkpoint: Path, text_file: Path) -> None:
    given: dict[str, Any] = {"bits": [3], "text": text_file, "window": WINDOW, "save": False, **arguments}
    with pytest.raises(ElastiqError, match=message):
        evaluate(random_checkpoint, **given)


def test_another_vocabulary_is_refused(random_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    import tiny

    other = tiny.make_model("llama", tmp_path / "other", vocab_size=270)
    with pytest.raises(ElastiqError, match=r"vocabularies differ \(270 and 260\)"):
        evaluate(random_checkpoint, [3], text_file, against=other, window=WINDOW, num_windows=1, save=False)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ElastiqError, match=r"3 bits: logits are not finite in torch.float32; use --dtype float32"):
        scores.Scores("3 bits").add(torch.full((2, 5), float("nan")), torch.tensor([1, 2]))


@pytest.mark.parametrize("template", ["<s> $A", "</s> <s> $A"])
def test_what_the_tokenizer_puts_before_a_text_is_context_and_not_counted(
    template: str, text_file: Path, tmp_path: Path
) -> None:
    """Against whole logits: every token of the text counts once, none of the beginning does."""
    import tiny

    source, checkpoint = tiny.make_model("llama", tmp_path / "model"), tmp_path / "nested"
    tiny.make_tokenizer(template).save_pretrained(source)
    write_random(AutoModelForCausalLM.from_pretrained(source), source, checkpoint)
    start = [{"<s>": 256, "</s>": 257}[token] for token in template.split()[:-1]]
    plain = AutoTokenizer.from_pretrained(source)(text_file.read_text(), add_special_tokens=False)["input_ids"]
    room, model = WINDOW - len(start), load(checkpoint, 4, dtype=torch.float32)
    nll = 0.0
    for first in range(0, 3 * room, room):
        window = torch.tensor([start + plain[first : first + room]])
        with torch.no_grad():
            log_q = model(window).logits[0].double().log_softmax(-1)
        nll -= sum(float(log_q[place - 1, window[0, place]]) for place in range(len(start), WINDOW))
    given: dict[str, Any] = {"window": WINDOW, "num_windows": 3, "against": source}
    result = evaluate(checkpoint, [4], text_file, **given)
    assert result["levels"][0]["perplexity"] == pytest.approx(math.exp(nll / (3 * room)), rel=1e-4)
    protocol = result["protocol"]
    tokens = "token 256" if len(start) == 1 else "tokens 257, 256"
    assert protocol["words"].startswith(
        f"sample.txt as one text, the tokenizer's {tokens} before every window, 3 non-overlapping windows of 24 "
        f"tokens, {room} predictions each; "
    )
    assert (protocol["beginning"], protocol["predicted_tokens"]) == (start, 3 * room)
    without = evaluate(checkpoint, [4], text_file, bos=False, **given)
    assert "beginning" not in without["protocol"] and "no special tokens" in without["protocol"]["words"]
    assert without["protocol"]["predicted_tokens"] == 3 * (WINDOW - 1)
    assert without["levels"][0]["perplexity"] != result["levels"][0]["perplexity"]
    assert [e["protocol"] for e in read_evaluations(checkpoint)] == [protocol, without["protocol"]]


def test_two_maps_of_one_mean_and_a_width_are_three_rows(
    random_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "copy"
    shutil.copytree(random_checkpoint, checkpoint)
    names = list(CheckpointReader(checkpoint).manifest.matrices)
    q, k, v, o = (next(n for n in names if n.endswith(f"layers.0.self_attn.{p}_proj")) for p in "qkvo")
    base = dict.fromkeys(names, 3)
    maps = [LevelMap({**base, low: 2, high: 4}) for low, high in ((q, o), (o, q), (k, v))]
    given: dict[str, Any] = {"window": WINDOW, "num_windows": 1}
    result = evaluate(checkpoint, [maps[0], 3, maps[1], LevelMap(base), maps[0]], text_file, **given)
    rows = result["levels"]
    assert [row["bits"] for row in rows] == [3, 3.0, 3.0]
    assert "map" not in rows[0] and {row["map"] for row in rows[1:]} == {maps[0].digest, maps[1].digest}
    assert len({row["perplexity"] for row in rows}) == 3
    assert row_name(rows[0]) == "3" and row_name(rows[1]) == f"3 (map {rows[1]['map']})"
    evaluate(checkpoint, [maps[2], maps[0]], text_file, **given)
    (kept,) = read_evaluations(checkpoint)
    assert [row.get("map") for row in kept["levels"]] == [None, *sorted(m.digest for m in maps)]
    assert kept["levels"][0] == rows[0]
    card = (checkpoint / "README.md").read_text()
    for row in kept["levels"]:
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {row_name(row)} |"))
        assert f"{row['perplexity']:.2f}" in line


@pytest.mark.parametrize("larger", ["tokenizer", "full"])
def test_a_token_beyond_the_embedding_is_one_sentence(larger: str, text_file: Path, tmp_path: Path) -> None:
    import tiny

    small = tiny.make_model("llama", tmp_path / "small", vocab_size=110, bos_token_id=1, eos_token_id=2)
    source = small if larger == "tokenizer" else tiny.make_model("llama", tmp_path / "model")
    checkpoint = tmp_path / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, checkpoint)
    odd = tmp_path / "odd.txt"
    odd.write_text("\u00ff" + text_file.read_text())
    what = "text: odd.txt" if larger == "tokenizer" else "against"
    with pytest.raises(ElastiqError, match=f"{what}: the token id [0-9]+ is not among the 110 rows of the model's emb"):
        evaluate(checkpoint, [4], odd, against=small, window=WINDOW, num_windows=1, save=False)
