"""Text and JSONL files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastiq.core import ElastiqError
from elastiq.text import read_records, read_text

ODD = ("one\u2028two", "one\u2029two", "one\u0085two", "one\x0btwo", "one\x1ctwo", "ein\u00a0zwei")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_jsonl_end_where_json_ends_them(mark: bytes, end: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ODD]
    file = tmp_path / "odd.jsonl"
    file.write_bytes(mark + end.join([lines[0], "", *lines[1:], ""]).encode())
    records = read_records(file, "calibration")
    assert [record["text"] for _, record in records] == list(ODD)
    assert [number for number, _ in records] == [1, 3, 4, 5, 6, 7]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "marked.txt"
    file.write_bytes(b"\xef\xbb\xbfa text\r\nof lines")
    assert read_text(file, "text") == "a text\nof lines"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"text": "half \\ud83d of a pair"}', "line 1: the text has U+D83D, half of a surrogate pair and no char"),
        (b'\n{"messages": [{"role": "user", "content": "\\udc00"}]}', "line 2: the text has U+DC00, half of a"),
        (b'{"text": 1}\n{"text": ', "line 2, is not valid JSON (Expecting value"),
        (b"[" * 100_000, "line 1, is not valid JSON"),
        (b'{"text": "\xff"}', "odd.jsonl is not UTF-8; convert it first"),
    ],
)
def test_what_is_no_record(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_bytes(content)
    with pytest.raises(ElastiqError) as error:
        read_records(file, "tasks")
    assert str(error.value).startswith("tasks: ") and sentence in str(error.value)


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    file = tmp_path / "pair.jsonl"
    file.write_bytes(b'{"text": "\\ud83d\\ude00"}')
    assert read_records(file, "calibration") == [(1, {"text": "\U0001f600"})]
