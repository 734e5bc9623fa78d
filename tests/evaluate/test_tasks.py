"""Tasks of lm-evaluation-harness against what the logits say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from tiny import build_model, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import elastiq
from elastiq import ElastiqError
from elastiq.checkpoint import CheckpointReader
from elastiq.cli import app
from elastiq.core import LevelMap
from elastiq.evaluate import evaluate_tasks, read_tasks, row_name

PAIRS = [{"good": f"the {i} cats sit", "bad": f"the {i} cats sits"} for i in range(6)]
CHOICES = [
    {"goal": f"open the box {i}", "sol1": "pull", "sol2": "push it hard", "label": i % 2} for i in range(4)
]  # fmt: skip
YAML = """
task: yaml_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    output = tmp_path_factory.mktemp("nested") / "nested"
    write_random(build_model("llama"), tiny_model("llama"), output)
    return output


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    return file


def likelihood(model: object, tokenizer: object, context: str, continuation: str) -> float:
    """Sum of the log-probabilities of the tokens of `continuation`."""
    start = tokenizer(context, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    rest = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([start + rest]), use_cache=False).logits.double().log_softmax(-1)[0]
    return sum(float(logits[len(start) + i - 1, token]) for i, token in enumerate(rest))


def test_every_width_scores_as_its_logits_say(checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    choices = tmp_path / "choices.jsonl"
    choices.write_text("\n".join(map(json.dumps, CHOICES)))
    result = evaluate_tasks(checkpoint, [2, 8], [str(pairs), str(choices)], save=False)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for row in result["levels"]:
        model = elastiq.load(checkpoint, row["bits"])
        right = [likelihood(model, tokenizer, "", f" {d['good']}") > likelihood(model, tokenizer, "", f" {d['bad']}")
                 for d in PAIRS]  # fmt: skip
        assert row["tasks"]["pairs"]["acc"] == pytest.approx(sum(right) / len(right))
        found = []
        for doc in CHOICES:
            context = f"Question: {doc['goal']}\nAnswer:"
            scores = [likelihood(model, tokenizer, context, f" {doc[key]}") for key in ("sol1", "sol2")]
            found.append(scores.index(max(scores)) == doc["label"])
        assert row["tasks"]["choices"]["acc"] == pytest.approx(sum(found) / len(found))
        assert "acc_norm" in row["tasks"]["choices"]


def test_results_are_kept_and_not_measured_again(
    checkpoint: Path, pairs: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["evaluate", str(checkpoint), "--tasks", str(pairs), "--bits", "2,3.37", "--limit", "3"]
    result = CliRunner().invoke(app, [*arguments, "--against", str(tiny_model("llama"))])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith("  pairs acc")
    assert [line.split()[0] for line in lines[1:4]] == ["2", "3.37", "16"]
    assert "at most 3 items of each; float32 arithmetic" in lines[4]
    assert [row["items"] for row in read_tasks(checkpoint).values()] == [3, 3, 3]

    def never(*args: object, **options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("elastiq.evaluate.tasks._run", never)
    again = CliRunner().invoke(app, [*arguments, "--against", str(tiny_model("llama"))])
    assert again.stdout == result.stdout
    with pytest.raises(AssertionError):
        evaluate_tasks(checkpoint, [2], [str(pairs)], limit=3, restart=True)


def test_yaml_files_of_the_harness(
    checkpoint: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "yaml_pairs.yaml").write_text(YAML.format(file=pairs))
    tasks = [str(tmp_path / "yaml_pairs.yaml"), str(pairs)]
    rows = evaluate_tasks(checkpoint, [4], tasks, save=False)["levels"][0]["tasks"]
    assert rows["yaml_pairs"]["acc"] == rows["pairs"]["acc"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "are not objects of the same fields"),
        ("[1]\n", "are not objects of the same fields"),
        ('{"a": 1}\n{"b": 1}\n', "are not objects of the same fields"),
        ("nonsense", r"tasks: .*bad\.jsonl, line 1, is not valid JSON"),
        ('{"text": "half \\ud83d"}', r"bad\.jsonl, line 1: the text has U\+D83D, half of a surrogate pair"),
        ('{"a": "one\u2028two\u0085three"}\n', "has lines of a, known are"),
        ('{"a": 1}\n', "has lines of a, known are ctx, endings, label; goal"),
    ],
)
def test_files_that_are_no_tasks(checkpoint: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ElastiqError, match=message):
        evaluate_tasks(checkpoint, [4], [str(tmp_path / "bad.jsonl")])


def test_without_the_harness_the_remedy_is_named(
    checkpoint: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ElastiqError, match=r"not installed .*pip install 'elastiq\[tasks\]'"):
        evaluate_tasks(checkpoint, [4], [str(pairs)])


def test_one_of_text_and_tasks(checkpoint: Path, pairs: Path) -> None:
    for options in ([], ["--text", "a", "--tasks", "b"]):
        result = CliRunner().invoke(app, ["evaluate", str(checkpoint), *options])
        assert result.exit_code == 2 and "give one of --text FILE and --tasks NAMES" in result.stderr


def test_contexts_start_as_the_tokenizer_starts_a_text(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness is told, a result without the beginning is another result, and the card says which it is."""
    source, output = make_model("llama", tmp_path / "model"), tmp_path / "nested"
    make_tokenizer("<s> $A").save_pretrained(source)
    write_random(build_model("llama"), source, output)
    told: list[bool] = []

    def run(*arguments: Any) -> dict[str, float]:
        told.append(arguments[-1])
        return {"acc": len(told) / 4}

    monkeypatch.setattr("elastiq.evaluate.tasks._harness", lambda: None)
    monkeypatch.setattr("elastiq.evaluate.tasks._run", run)
    monkeypatch.setattr("elastiq.evaluate.tasks.version", lambda name: "1")
    assert "bos" not in evaluate_tasks(output, [2], [str(pairs)])["protocol"]
    assert evaluate_tasks(output, [2], [str(pairs)], bos=False)["protocol"]["bos"] is False
    names = list(CheckpointReader(output).manifest.matrices)
    maps = [LevelMap({**dict.fromkeys(names, 3), names[a]: 2, names[b]: 4}) for a, b in ((0, 3), (3, 0))]
    result = evaluate_tasks(output, [*maps, 3], [str(pairs)])
    assert told == [True, False, True, True, True]
    assert [row["tasks"]["pairs"]["acc"] for row in result["levels"]] == [0.75, 1.0, 1.25]
    card = (output / "README.md").read_text()
    assert "| bits | pairs acc, 6 items | pairs acc, 6 items, no BOS |" in card
    assert "| 2 | 0.250 | 0.500 |" in card and "| 3 | 1.000 |  |" in card
    assert all(f"| {row_name(row)} |" in card for row in result["levels"])
    both = tmp_path / "both"
    make_tokenizer("<s> $A </s>").save_pretrained(source)
    write_random(build_model("llama"), source, both)
    with pytest.raises(ElastiqError, match=r"also puts tokens behind a text, .* between a context and its answer; use"):
        evaluate_tasks(both, [2], [str(pairs)], save=False)
    evaluate_tasks(both, [2], [str(pairs)], bos=False, save=False)


def test_a_token_beyond_the_embedding_is_named(checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    source, output = make_model("llama", tmp_path / "model", vocab_size=70), tmp_path / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    with pytest.raises(ElastiqError, match=r"pairs: the token id [0-9]+ is not among the 70 rows of the model's emb"):
        evaluate_tasks(output, [2], [str(pairs)], save=False)
