"""The command line, as its user meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from elastiq import ElastiqError, __version__, cli, load
from elastiq.cli import tables

TEXT = "".join(f"{i}: the quick brown fox, {i * 7919 % 1000} lazy dogs;\n" for i in range(60))
QUICK = ["--recipe", "rtn", "--levels", "2,4", "--group-size", "32", "--num-samples", "2", "--seq-len", "32"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def made(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished checkpoint of levels 2 and 4, and what the command said."""
    output = tmp_path_factory.mktemp("made") / "nested"
    result = ok("quantize", model, "-o", output, *QUICK, "--calibration", text_file, "--json", output.parent / "q.json")
    return output, result


def test_version() -> None:
    assert ok("--version").stdout == f"elastiq {__version__}\n"


def test_every_command_has_help() -> None:
    allocating = ("allocate", "sensitivity", "frontier")
    for command in (*allocating, "quantize", "evaluate", "generate", "report", "inspect", "slice"):
        assert command in ok("--help").stdout
        assert "--help" in ok(command, "--help").stdout


def test_quantize_says_what_was_made(made: tuple[Path, Result]) -> None:
    output, result = made
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["bits", "bits", "per", "weight", "memory", "disk", "mean", "error"]
    assert [line.split()[:2] for line in lines[1:3]] == [["2", "3.00"], ["4", "5.00"]]
    assert "14 matrices, 2 calibration windows" in lines[3]
    assert "peak memory" in lines[3]
    assert "\x1b" not in result.output
    saved = json.loads((output.parent / "q.json").read_text())
    assert saved["levels"]["4"]["bits_per_weight"] == 5.0


def test_quantize_again_has_nothing_to_do(made: tuple[Path, Result], model: Path, text_file: Path) -> None:
    output, _ = made
    before = {f.name: f.stat().st_mtime_ns for f in output.iterdir()}
    result = ok("quantize", model, "-o", output, *QUICK, "--calibration", text_file)
    assert "is finished already" in result.stdout
    assert before == {f.name: f.stat().st_mtime_ns for f in output.iterdir()}


def test_quantize_otherwise_is_refused(made: tuple[Path, Result], model: Path, text_file: Path) -> None:
    result = run("quantize", model, "-o", made[0], *QUICK, "--symmetric", "--calibration", text_file)
    assert result.exit_code == 1
    assert re.fullmatch(r"elastiq: error: .*symmetric.*--restart.*\n", result.stderr)


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = ok("quantize", model, "-o", tmp_path / "out", "--dry-run", "--json", tmp_path / "plan.json")
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert len(planned["matrices"]) == 14
    assert "mlp.down_proj" in result.stdout
    assert "of free disk (estimates)" in result.stdout


def test_evaluate(made: tuple[Path, Result], model: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    arguments = ("--bits", "2,3,4", "--against", model, "--window", 32, "--num-windows", 3, "--json", file)
    result = ok("evaluate", made[0], "--text", text_file, *arguments)
    scores = json.loads(file.read_text())
    assert [row["bits"] for row in scores["levels"]] == [2, 3, 4]
    assert scores["full"]["perplexity"] > 1
    for key in ("bits_per_weight", "perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement"):
        assert isinstance(scores["levels"][0][key], float)
    assert "KL mean" in result.stdout
    assert (
        "3 non-overlapping windows of 32 tokens, 31 predictions each; float32 arithmetic; 93 predicted" in result.stdout
    )
    assert "\x1b" not in result.output
    assert json.loads((made[0] / "evaluation.json").read_text())["evaluations"][0]["levels"][0]["bits"] == 2


def test_evaluate_without_full_model_shows_no_divergence(made: tuple[Path, Result], text_file: Path) -> None:
    result = ok("evaluate", made[0], "--text", text_file, "--window", 32, "--num-windows", 1)
    assert "KL" not in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["2", "4"]


def test_generate_is_greedy_and_uses_the_chat_template(made: tuple[Path, Result]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[0])
    net: Any = load(made[0], 4)
    ids = tokenizer("<user>hello\n<assistant>", return_tensors="pt")["input_ids"]
    expected = net.float().generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    result = ok("generate", made[0], "--bits", 4, "hello", "--max-new-tokens", 8)
    assert result.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert result.stderr == ""
    assert ok("generate", made[0], "--bits", 4, "hello", "--max-new-tokens", 8, "--raw").stdout != result.stdout


def test_generate_samples_by_seed(made: tuple[Path, Result]) -> None:
    sample = [
        ok("generate", made[0], "x", "--max-new-tokens", 12, "--temperature", 1, "--seed", s).stdout for s in (1, 1, 2)
    ]
    assert sample[0] == sample[1] != sample[2]


def test_report_names_its_file(made: tuple[Path, Result], tmp_path: Path) -> None:
    assert ok("report", made[0], "-o", tmp_path / "page.html").stdout == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    copy = shutil.copytree(made[0], tmp_path / "copy")
    (copy / "evaluation.json").unlink(missing_ok=True)
    refused = run("report", copy, "-o", tmp_path / "absent.svg")
    assert refused.exit_code == 1 and "has not been evaluated; run elastiq evaluate first" in refused.output


def test_inspect_a_model(model: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "i.json"
    arguments = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 32, "--json", file)
    result = ok("inspect", model, *arguments)
    data = json.loads(file.read_text())
    assert len(data["matrices"]) == 14
    assert data["matrices"][0]["input_abs_max"] > 0
    assert data["plan"]["levels"]["2"]["bits_per_weight"] > 2
    assert "q_proj, k_proj, v_proj" in result.stdout
    assert "lm_head" in result.stdout
    assert "head, quantized only with --embeddings" in result.stdout
    assert "\x1b" not in result.output


def test_inspect_without_activations(model: Path, tmp_path: Path) -> None:
    result = ok("inspect", model, "--no-activations", "--json", tmp_path / "i.json")
    data = json.loads((tmp_path / "i.json").read_text())
    assert data["activations"] is None
    assert data["matrices"][0]["input_abs_max"] is None
    assert data["matrices"][0]["weight_abs_max"] > 0
    assert "largest input" not in result.stdout
    assert "compiled code" in data["tokens"] and f"single tokens: {data['tokens']}" in result.stdout


def test_inspect_and_slice_a_checkpoint(made: tuple[Path, Result], tmp_path: Path) -> None:
    assert ok("slice", made[0], "--bits", 3, "-o", tmp_path / "small").stdout.startswith(
        f"{tmp_path / 'small'}: 1, 2, 3 bits"
    )
    result = ok("inspect", tmp_path / "small", "--json", tmp_path / "i.json")
    data = json.loads((tmp_path / "i.json").read_text())
    assert data["available"] == [1, 2, 3]
    assert [w["bits"] for w in data["widths"]] == [1, 2, 3]
    assert "nested" not in data["files"]
    assert "mlp.down_proj" in result.stdout
    assert "compiled code" in data["tokens"] and f"single tokens: {data['tokens']}" in result.stdout
    refused = run("evaluate", tmp_path / "small", "--bits", "4", "--text", __file__)
    assert refused.exit_code == 1
    assert "it can be read at 1 to 3 bits, not 4" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "a", "-o", "b", "--levels", "2,x"), 2, "'2,x' is not a list of whole numbers such as"),
        (("quantize", "a", "-o", "b", "--levels", "4,9"), 2, "9 is not a width from 1 to 8"),
        (("quantize", "a", "-o", "b", "--recipe", "magic"), 2, "magic"),
        (("quantize", "a"), 2, "--output"),
        (("generate", "a", "b", "--bits", "9"), 2, "--bits"),
        (("quantize", "absent-dir/x/y", "-o", "b"), 1, "elastiq: error: absent-dir/x/y does not exist"),
        (("evaluate", "absent", "--text", "t"), 1, "elastiq: error: absent: no such directory"),
        (("report", "."), 1, "not an elastiq checkpoint"),
        (("evaluate", "absent", "--text", "t", "--device", "warp"), 1, "device 'warp' cannot be used"),
    ],
)
def test_errors_are_one_sentence_and_a_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.splitlines()) == 1


def test_a_prompt_that_does_not_fit(made: tuple[Path, Result]) -> None:
    assert "the prompt is empty" in run("generate", made[0], "", "--raw").stderr
    assert "context 256; shorten the prompt" in run("generate", made[0], "x" * 300).stderr


def test_json_is_written_whole_or_not_at_all(made: tuple[Path, Result], tmp_path: Path) -> None:
    result = run("inspect", made[0], "--json", tmp_path / "absent" / "i.json")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "M", "-o", "O", "--json"), ("inspect", "M", "--json"), ("evaluate", "M", "--json"),
        ("export", "M", "--to", "hf", "-o", "O", "--json"), ("allocate", "M", "--json"), ("allocate", "M", "-o"),
        ("sensitivity", "M", "--json"), ("frontier", "M", "--json"), ("frontier", "M", "--picture"),
        ("recipes", "--json"), ("recipes", "--page"), ("report", "M", "-o"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_files_that_cannot_be_written_are_noticed_before_the_work(words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "absent" / "file.svg"
    result = run(*words, file)
    assert result.exit_code == 1
    sentence = f"{file}: cannot be written (there is no directory {file.parent}); choose another file"
    assert result.stderr.strip() == f"elastiq: error: {sentence}"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_terminal_prints(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [TextIOWrapper(BytesIO(), encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    said = "\u2581 \u00e9 \ud800"

    def say() -> None:
        print(said)
        tables.out.print(said)
        print(said, file=sys.stderr)

    monkeypatch.setattr(sys.modules["elastiq.cli.app"], "app", say)
    cli.main()
    for stream in streams:
        stream.flush()
        assert said.encode(encoding, "backslashreplace") in stream.buffer.getvalue()


def test_interrupt_says_that_the_same_command_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.quantize, "quantize", interrupted)
    result = run("quantize", "a", "-o", "b")
    assert result.exit_code == 130
    assert result.stderr == "elastiq: error: interrupted; finished blocks are kept, the same command resumes\n"


def test_names_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise ElastiqError("bad\x1b[2J\nname [red]x[/red]")

    monkeypatch.setattr(cli.quantize, "inspect_model", refused)
    assert run("inspect", "a").stderr == "elastiq: error: bad [2J name [red]x[/red]\n"


def test_on_a_terminal_there_are_tables_and_bars(
    made: tuple[Path, Result], text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables.out, "_force_terminal", True)
    monkeypatch.setattr(tables.out, "is_interactive", True)
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    result = ok("evaluate", made[0], "--text", text_file, "--window", 32, "--num-windows", 2)
    assert "evaluating" in result.stdout
    assert "left" in result.stdout
    assert "next: elastiq report" in result.stdout
    assert "─" in result.stdout


def test_allocate_prints_every_unit(made: tuple[Path, Result], text_file: Path, tmp_path: Path) -> None:
    output, _ = made
    result = ok("allocate", output, "--bits", 3.37, "-o", tmp_path / "map.json", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mean_bits"] <= 3.37 and found["bits_per_weight"] == pytest.approx(found["mean_bits"] + 1)
    assert re.search(r"mean width 3\.\d+ bits, 4\.\d+ bits per weight, [\d.]+ [kM]B in memory", result.stdout)
    assert "integer-programme on output-error: predicted loss" in result.stdout
    assert json.loads((tmp_path / "map.json").read_text())["widths"] == found["widths"]
    mixed = ["--bits", "2,3.37", "--map", tmp_path / "map.json"]
    rows = ok("evaluate", output, "--text", text_file, "--window", 32, *mixed).stdout.splitlines()
    (digest,) = re.findall(r"map (\w{8}): mean width", result.stdout)
    assert [line.split("  ")[0] for line in rows[1:3]] == ["2", f"3.37 (map {digest})"], "one map, asked for twice"
    assert not any(line.startswith(("2 ", "3.37")) for line in rows[3:])
    assert ok("generate", output, "lazy", "--map", tmp_path / "map.json", "--max-new-tokens", 2).stdout
    assert ok("generate", output, "lazy", "--bits", 2.5, "--max-new-tokens", 2).stdout
    assert ok("generate", output, "lazy", "--memory", "1MB", "--max-new-tokens", 2).stdout


def test_budgets_that_cannot_be_met_are_one_line(made: tuple[Path, Result]) -> None:
    result = run("allocate", made[0], "--size", "1kB")
    assert result.exit_code == 1
    assert re.fullmatch(r"elastiq: error: budget: 1000 bytes is less than the smallest map.*\n", result.stderr)
    assert "give a limit" in run("allocate", made[0]).stderr
    assert run("generate", made[0], "x", "--bits", 2, "--memory", "1MB").exit_code == 2


def test_frontier(made: tuple[Path, Result], tmp_path: Path) -> None:
    result = ok("frontier", made[0], "--json", tmp_path / "curve.json", "--picture", tmp_path / "curve.png")
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [step["stop"] for step in curve["steps"]] == [4] * len(curve["steps"])
    assert f"{len(curve['steps'])} steps from 3.00 bits per weight" in result.stdout
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_sensitivity_and_measured_allocation(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "nested"
    ok("quantize", model, "-o", output, *QUICK, "--calibration", text_file)
    few = ["--text", text_file, "--window", 32, "--num-windows", 2]
    result = ok("sensitivity", output, *few, "--json", tmp_path / "kl.json")
    assert "most sensitive" in result.stdout and "kl on sample.txt" in result.stdout
    assert len(json.loads((tmp_path / "kl.json").read_text())["groups"]) == 8
    assert "KL divergence" in ok("allocate", output, "--bits", 3).stdout
    assert "measured, uniform 2 bits is worse" in ok("allocate", output, "--bits", 3, "--verify", *few).stdout
    bounded = ok("allocate", output, "--max-damage", "kl=1.0", *few).stdout
    assert "the smallest map whose predicted KL divergence" in bounded and "measured on sample.txt" in bounded
    assert "ms per token" in ok("allocate", output, "--latency", "10s").stdout
    assert run("allocate", output, "--max-damage", "ppl=3").exit_code == 2
    assert run("allocate", output, "--bits", 3, "--verify").exit_code == 2


def test_a_recipe_printed_changed_and_used(model: Path, text_file: Path, tmp_path: Path) -> None:
    mine = json.loads(ok("recipes", "rtn").stdout)
    mine["transforms"] = [{"name": "hadamard"}]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    few = ["--recipe", tmp_path / "mine.json", "--num-samples", 2, "--seq-len", 32, "--calibration", text_file]
    ok("quantize", model, "-o", tmp_path / "out", *few)
    small = [*QUICK, "--scales", "int6", "--rotate", "--calibration", text_file]
    ok("quantize", model, "-o", tmp_path / "small", *small)
    assert "--scales int6 --rotate" in (tmp_path / "small" / "README.md").read_text()
    assert "QuaRot" in ok("cite", tmp_path / "small").stdout
    refused = run("quantize", model, "-o", tmp_path / "c", "--recipe", "quarot", "--rotate")
    assert refused.exit_code == 1 and "rotates already" in refused.stderr
    assert "transform: QuaRot" in ok("cite", tmp_path / "out").stdout
    assert "recipe 'magic' does not exist" in run("recipes", "magic").stderr
    both = run("quantize", model, "-o", tmp_path / "b", *few, "--group-size", 32, "--embeddings")
    assert both.exit_code == 2 and "leave out --group-size, --embeddings" in " ".join(both.stderr.split())


def test_a_tuned_recipe(model: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--recipe", "nested-tuned", *QUICK[2:], "--calibration", text_file, "--tuning-text", text_file]
    options[options.index("--levels") + 1] = "2,4,6"
    assert "quantizing takes about" in ok("quantize", model, "-o", tmp_path / "out", *options, "--dry-run").stdout
    made = ok("quantize", model, "-o", tmp_path / "out", *options, "--json", tmp_path / "q.json")
    assert "KL before tuning" in made.stdout
    assert next(row for row in made.stdout.splitlines() if row.startswith("6 ")).split()[-2:] == ["-", "-"]
    assert set(json.loads((tmp_path / "q.json").read_text())["tuning"]) == {"2", "4"}
    page = Path(ok("report", tmp_path / "out").stdout.strip()).read_text(encoding="utf-8")
    assert "--recipe nested-tuned" in page and "scales" in page
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"--calibration {text_file.name} --tuning-text {text_file.name} --num-samples 2 --seq-len 32" in card
    assert "tuner: EfficientQAT, arXiv:2407.11062" in ok("cite", tmp_path / "out").stdout


def test_windows_start_as_the_tokenizer_starts_a_text(text_file: Path, tmp_path: Path) -> None:
    """Every command that cuts a text says so, and --no-bos takes it back."""
    model, output, plain = make_model("llama", tmp_path / "model"), tmp_path / "nested", tmp_path / "plain"
    make_tokenizer("<s> $A").save_pretrained(model)
    quick = [*QUICK, "--calibration", text_file]
    ok("quantize", model, "-o", output, *quick)
    ok("quantize", model, "-o", plain, *quick, "--no-bos")
    facts = [json.loads((path / "fingerprint.json").read_text())["calibration"] for path in (output, plain)]
    assert facts[0]["beginning"] == [256] and "beginning" not in facts[1] and facts[0]["text"] != facts[1]["text"]
    assert "--no-bos" not in (output / "README.md").read_text()
    assert re.search(r"elastiq quantize .* --no-bos$", (plain / "README.md").read_text(), re.MULTILINE)
    assert "beginning was [256], is not set" in run("quantize", model, "-o", output, *quick, "--no-bos").stderr
    few = ["--text", text_file, "--window", 32, "--num-windows", 1]
    begins = "the tokenizer's token 256 before every window"
    for command in (["inspect", model], ["evaluate", output, *few]):
        assert begins in ok(*command).stdout
        assert "no special tokens" in ok(*command, "--no-bos").stdout
    assert begins in (output / "README.md").read_text()
    ok("sensitivity", output, *few, "--no-bos", "--json", tmp_path / "kl.json")
    assert "beginning" not in json.loads((tmp_path / "kl.json").read_text())["text"]
    ok("quantize", model, "-o", tmp_path / "r", *QUICK, "--rehearse", "--no-bos")


def test_half_of_a_surrogate_pair_is_one_sentence(made: tuple[Path, Result], model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "words"}\n{"text": "half \\ud83d"}\n')
    for command in (["quantize", model, "-o", tmp_path / "out", "--calibration"], ["inspect", model, "--calibration"]):
        result = run(*command, half)
        assert result.exit_code == 1 and "half.jsonl, line 2: the text has U+D83D, half of a surrogate" in result.stderr
    for options in ([], ["--raw"]):
        result = run("generate", made[0], "half \ud83d", *options)
        assert result.exit_code == 1 and "the prompt: the text has U+D83D, half of a surrogate pair" in result.stderr
