"""What lies beside an output or behind a link is somebody's data; what is published is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from random_checkpoint import contents, write_small

from elastiq.checkpoint import CheckpointReader, CheckpointWriter, is_finished, slice_checkpoint
from elastiq.checkpoint.files import check_named, replace_durably, tree_bytes, write_named
from elastiq.checkpoint.publish import MARK, WorkDirectory, new_place, scratch, write_aside
from elastiq.core import ElastiqError


def writing(output: Path) -> None:
    write_aside(output, False, lambda work: (work / "file").write_text("ours"))


@pytest.mark.parametrize(("kind", "act"), [("partial", lambda o: CheckpointWriter(o, {})), ("writing", writing)])
def test_a_directory_without_our_mark_is_never_touched(tmp_path: Path, kind: str, act: object) -> None:
    theirs = tmp_path / f"out.{kind}"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(ElastiqError) as caught:
        act(tmp_path / "out")
    assert str(caught.value) == (
        f"{theirs}: is in the way and does not bear elastiq's mark; move it away, or choose another output"
    )
    assert contents(theirs) == {"thesis.txt": b"years of work"}


def test_links_are_never_followed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"miaow")
    (tmp_path / "out.writing").symlink_to(tmp_path / "photos")
    with pytest.raises(ElastiqError, match="is in the way"):
        writing(tmp_path / "out")
    (tmp_path / "photos" / MARK).symlink_to(tmp_path / "nothing")
    (tmp_path / "out.writing").unlink()
    (tmp_path / "photos").rename(tmp_path / "out.writing")
    with pytest.raises(ElastiqError, match="is in the way"):
        writing(tmp_path / "out")
    assert (tmp_path / "out.writing" / "cat.jpg").read_bytes() == b"miaow" and not (tmp_path / "nothing").exists()


def test_links_inside_a_work_directory_go_without_their_target(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / ".cat.0123abcd.elastiq-tmp").write_bytes(b"miaow")
    CheckpointWriter(tmp_path / "out", {}).close()
    work = tmp_path / "out.partial"
    (work / "states").symlink_to(tmp_path / "photos")
    (work / "units").rmdir()
    (work / "units").symlink_to(tmp_path / "photos")
    with pytest.raises(ElastiqError, match="units: is a link, which elastiq did not make"):
        CheckpointWriter(tmp_path / "out", {})
    CheckpointWriter(tmp_path / "out", {}, restart=True).close()
    assert len(list((tmp_path / "photos").iterdir())) == 1


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "out", "writing") as work:
        (work.path / "result").mkdir()
        (work.path / "result" / "half").write_text("x")
    writing(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == {"file": b"ours"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    whole = write_small(tmp_path / "whole")

    def second(work: Path) -> None:
        with pytest.raises(ElastiqError) as caught:
            slice_checkpoint(whole, 3, tmp_path / "out")
        out = tmp_path / "out"
        assert str(caught.value) == f"{out}: another process is writing it; wait for it, or choose another output"
        (work / "first").touch()

    write_aside(tmp_path / "out", False, second)
    assert list(contents(tmp_path / "out")) == ["first"]
    with pytest.raises(ElastiqError, match="exists already"):
        slice_checkpoint(whole, 3, tmp_path / "out")


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    for is_file in (False, True):
        output = tmp_path / f"out-{is_file}"

        def write(work: Path, output: Path = output, is_file: bool = is_file) -> None:
            (work if is_file else work / "file").write_text("ours")
            output.write_text("theirs")

        with pytest.raises(ElastiqError, match="exists already; choose another output"):
            write_aside(output, is_file, write)
        assert output.read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 2


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for name, place in (("link", "disk"), ("dangling", "later")):
        writing(tmp_path / name)
        assert (tmp_path / name).is_symlink() and contents(tmp_path / place) == {"file": b"ours"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ElastiqError, match="it is the directory you are in, which cannot be replaced; give a new"):
        new_place(".")
    assert new_place("../sub/../out") == tmp_path / "out"
    with pytest.raises(ElastiqError, match="it is the root of a disk"):
        new_place("/")
    (tmp_path / "file").touch()
    with pytest.raises(ElastiqError, match=f"nothing can be written in {tmp_path / 'file'}; choose another output"):
        new_place(tmp_path / "file" / "out")
    nested = write_small(tmp_path / "nested")
    for inside in (nested / "out", nested / "a" / "b"):
        with pytest.raises(ElastiqError, match=rf"{inside}: lies inside the checkpoint {nested}; choose another"):
            CheckpointWriter(inside, {})
    assert CheckpointReader(nested).available[-1] == 8


def test_named_files(tmp_path: Path) -> None:
    nested = write_small(tmp_path / "nested")
    for path, reason in (
        (tmp_path, "it is a directory"),
        (tmp_path / "no" / "file.json", f"there is no directory {tmp_path / 'no'}"),
        (nested / "config.json", f"it is part of the checkpoint {nested}"),
        (nested / "checksums.json", f"it is part of the checkpoint {nested}"),
    ):
        with pytest.raises(ElastiqError) as caught:
            check_named(path)
        assert str(caught.value) == f"{path}: cannot be written ({reason}); choose another file"
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "new", nested / "mine.json", tmp_path / "link", Path("/dev/null")):
        check_named(path)
        write_named(path, b"text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"text"


def test_a_replaced_file_is_no_way_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    replace_durably(tmp_path / "link", lambda temporary: temporary.write_text("ours"))
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / "link").read_text() == "ours"
    assert sorted(os.listdir(tmp_path)) == ["link", "theirs"]


def test_left_by_a_killed_evaluation(tmp_path: Path) -> None:
    output = write_small(tmp_path / "out", fingerprint={"seed": 0})
    (output / ".evaluation.json.0123abcd.elastiq-tmp").write_text("{")
    CheckpointWriter(output, {"seed": 1}, restart=True).close()


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}', '{"files": {"config.json": {"sha256": 1}}}', "{"])
def test_damaged_checksums(tmp_path: Path, content: str) -> None:
    output = write_small(tmp_path / "out", fingerprint={"seed": 0})
    (output / "checksums.json").write_text(content)
    for act in (lambda: is_finished(output, {"seed": 0}), lambda: CheckpointWriter(output, {"seed": 1}, restart=True)):
        with pytest.raises(ElastiqError, match=r"checksums\.json: not .*; copy it from the original checkpoint"):
            act()


def test_side_files_are_checked(tmp_path: Path) -> None:
    output = write_small(tmp_path / "out")
    (output / "LICENSE").write_text("the owner's")
    CheckpointReader(output).check_side_files()
    (output / "added_tokens.json").write_text("{}")
    with pytest.raises(ElastiqError, match=r"checksums\.json does not cover added_tokens\.json"):
        CheckpointReader(output).check_side_files()
    (output / "added_tokens.json").unlink()
    (output / "generation_config.json").write_text("{ }")
    with pytest.raises(ElastiqError, match=r"generation_config\.json: altered"):
        CheckpointReader(output).check_side_files()
    CheckpointReader(output, verify=False).check_side_files()


def test_bytes_of_a_tree(tmp_path: Path) -> None:
    with scratch(tmp_path / "out", "partial") as work:
        (work.path / "a").mkdir()
        (work.path / "a" / "b").write_bytes(bytes(8192))
        (work.path / "link").symlink_to("/usr")
        assert 8192 <= tree_bytes(work.path) < 16384
        (tmp_path / "link").symlink_to(work.path)
        assert tree_bytes(tmp_path / "link") == tree_bytes(tmp_path / "absent") == 0
