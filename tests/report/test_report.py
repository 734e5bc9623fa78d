"""The page about a checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from random_checkpoint import write_random
from transformers import AutoModelForCausalLM

from elastiq.core import ElastiqError
from elastiq.report import write_picture, write_report
from elastiq.report.charts import INK, SERIES, Line, line_chart
from elastiq.report.data import Hardest, activation_lines, experts, hardest, heat_maps

_VOID = {"meta", "br", "link", "img", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags nest and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(text: str = "sample.txt", against: str | None = "full-model") -> dict[str, Any]:
    rows = []
    for bits in (2, 3, 4, 6, 8):
        kl = 4.0**-bits if against else None
        row = {"bits": bits, "bits_per_weight": bits + 1.0, "perplexity": 20 * (1 + 8.0**-bits), "kl_mean": kl}
        rows.append(row | {"kl_p99": kl and 5 * kl, "kl_max": kl and 9 * kl, "top1_agreement": kl and 1 - kl})
    protocol = {"words": f"{text} as one text", "text": text, "window": 8, "num_windows": 2, "predicted_tokens": 14}
    full = {"perplexity": 20.0 if against else None}
    return {"checkpoint": "x", "against": against, "protocol": protocol, "full": full, "levels": rows}


def replace_file(checkpoint: Path, name: str, data: Any) -> None:
    """Write another JSON file and its checksum."""
    content = json.dumps(data).encode()
    (checkpoint / name).write_bytes(content)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


def table() -> list[dict[str, Any]]:
    rows = []
    for block in range(3):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            levels = {str(b): {"num_bits": 1, "error": (1 + block) * 4.0**-b} for b in (2, 4)}
            rows.append(
                {
                    "name": f"m.layers.{block}.{name}",
                    "role": "linear",
                    "block": block,
                    "shape": [8, 8],
                    "levels": levels,
                }
                | {"abs_max": 50.0 if "down" in name else 3.0 + block}
            )
    return rows


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    source, output = tiny_model("llama"), tmp_path / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    return output


def test_page_without_evaluation_says_what_to_run(checkpoint: Path) -> None:
    file = write_report(checkpoint)
    page = Page(file.read_text(encoding="utf-8"))
    assert file == checkpoint / "report.html"
    assert "elastiq evaluate nested --bits 2,3,4,6,8 --text FILE.txt --against MODEL" in page.text
    assert "Quality has not been measured yet" in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_page_with_evaluations_has_pictures(checkpoint: Path, tmp_path: Path) -> None:
    kept = {"evaluations": [evaluation("first.txt"), evaluation("second.txt")]}
    (checkpoint / "evaluation.json").write_text(json.dumps(kept))
    file = write_report(checkpoint, tmp_path / "page.html")
    page = Page(file.read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert "second.txt as one text" in page.text
    assert "Where the error lives" in page.text
    assert not (checkpoint / "report.html").exists()


def test_page_is_self_contained_and_deterministic(checkpoint: Path) -> None:
    (checkpoint / "evaluation.json").write_text(json.dumps({"evaluations": [evaluation()]}))
    first = write_report(checkpoint).read_text(encoding="utf-8")
    assert first == write_report(checkpoint).read_text(encoding="utf-8")
    page = Page(first)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value is not None
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", first)
    assert str(checkpoint.parent) not in first


def test_names_from_a_checkpoint_are_escaped(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, output = tiny_model("llama"), tmp_path / "<img src=x onerror=alert(1)>"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    hostile = evaluation("<script>$\\frac{1}{2}$</script>&amp;.txt")
    (output / "evaluation.json").write_text(json.dumps({"evaluations": [hostile, evaluation()]}))
    page = Page(write_report(output).read_text(encoding="utf-8"))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "<script>$\\frac{1}{2}$</script>&amp;.txt" in page.text


def test_broken_evaluation_file_is_left_aside(checkpoint: Path) -> None:
    (checkpoint / "evaluation.json").write_text('{"evaluations": [{"levels": 3}]}')
    assert "Quality has not been measured yet" in write_report(checkpoint).read_text(encoding="utf-8")


def test_evaluation_without_full_model(checkpoint: Path) -> None:
    (checkpoint / "evaluation.json").write_text(json.dumps({"evaluations": [evaluation(against=None)]}))
    page = Page(write_report(checkpoint).read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
    assert "KL mean" not in page.text


def test_experts_are_drawn(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, output = tiny_model("mixtral"), tmp_path / "moe"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    page = Page(write_report(output).read_text(encoding="utf-8"))
    assert "Experts" in page.text
    assert sum(tag == "i" for tag, _ in page.tags) == 2 * 4


def test_report_refuses_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match="not an elastiq checkpoint"):
        write_report(tmp_path)


def test_report_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ElastiqError, match="cannot be written"):
        write_report(checkpoint, tmp_path / "absent" / "page.html")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ElastiqError, match="has not been evaluated; run elastiq evaluate first"):
        write_picture(checkpoint, tmp_path / f"a{suffix}")
    (checkpoint / "evaluation.json").write_text(json.dumps({"evaluations": [evaluation()]}))
    content = write_picture(checkpoint, tmp_path / f"a{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert INK.encode() not in content


def test_charts_take_their_colours_from_the_page() -> None:
    svg = line_chart(
        [Line("a", [1, 2], [3, 4], ["p", "q"]), Line("b", [1, 2], [30, 40], colour=1)], "x", "y", log_y=True
    )
    assert svg.startswith("<svg")
    assert not any(stand_in in svg for stand_in in (INK, *SERIES))
    assert "var(--ink)" in svg
    assert "var(--series-2)" in svg
    Page(svg)


def test_heat_map_cells_and_range() -> None:
    maps = heat_maps(table(), [2, 4, 8])
    assert [m.level for m in maps] == [2, 4]
    assert maps[0].kinds == ("q_proj", "k_proj", "down_proj")
    assert maps[0].mean == pytest.approx(2 / 16)
    assert maps[0].low <= 1 / 16 < 3 / 16 <= maps[0].high
    assert "block 2, mlp.down_proj, 2 bits: error 0.188" in [c.title for r in maps[0].cells for c in r if c]
    assert heat_maps([{**row, "levels": {}} for row in table()], [2]) == []


def test_hardest_are_the_largest_in_proportion() -> None:
    assert [row["name"].split(".")[2] for row in hardest(table(), [2, 4], count=4).rows] == ["2", "2", "2", "1"]


def test_hardest_has_a_column_for_every_level_with_errors_and_no_other() -> None:
    """A tuned level has no errors of matrices: its column is left out of the head and of the rows alike."""
    rows = table()
    for row in rows:
        row["levels"]["3"] = {"num_bits": 1, "error": None}
    worst = hardest(rows, [2, 3, 4], count=1)
    assert worst.levels == (2, 4) and worst.rows[0]["errors"] == [3 * 4.0**-2, 3 * 4.0**-4]
    assert hardest([{**row, "levels": {}} for row in rows], [2, 3, 4]) == Hardest((), ())


def test_errors_stand_below_their_levels_where_some_were_tuned(checkpoint: Path) -> None:
    levels = json.loads((checkpoint / "levels.json").read_text())
    for row in levels["matrices"]:
        for level, cell in row["levels"].items():
            cell["error"] = None if level in ("3", "6") else 10.0 ** -int(level)
    replace_file(checkpoint, "levels.json", levels)
    text = write_report(checkpoint).read_text(encoding="utf-8")
    head, *body = re.findall("<tr>.*?</tr>", text[text.index("Hardest matrices") :].partition("</table>")[0])
    assert re.findall("<th>(.*?)</th>", head) == ["matrix", "shape", "2 bits", "4 bits", "8 bits"]
    assert body and all(re.findall("<td>(.*?)</td>", row)[1:] == ["0.01", "0.0001", "1e-08"] for row in body)


def test_kinds_with_one_input_share_a_curve() -> None:
    lines = activation_lines(table())
    assert [line.name for line in lines] == ["q_proj, k_proj", "down_proj"]
    assert list(lines[0].y) == [3.0, 4.0, 5.0]
    assert activation_lines([{**row, "abs_max": None} for row in table()]) == []


def test_experts_of_a_block() -> None:
    row = {"role": "expert", "block": 1, "shape": [4, 4], "levels": {}, "tokens": 7, "fallback": False}
    rows = [
        row | {"name": f"m.1.mlp.experts.{tensor}.{e}"} for tensor in ("gate_up_proj", "down_proj") for e in range(2)
    ]
    rows[3] |= {"fallback": True}
    ((block, each),) = experts(rows)
    assert block == 1
    assert [(e.number, e.tokens, e.fallback) for e in each] == [(0, 7, False), (1, 7, True)]
