"""Runs that are killed, refused, or out of disk."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import SMALL, contents, fill_small, row, small_source, small_unit, write_small

from elastiq.checkpoint import CheckpointReader, CheckpointWriter, is_finished, work_directory
from elastiq.core import ElastiqError

FEW = (1, 2)
"""Levels: few files, so that few steps show every moment of a run."""
FINGERPRINT = {
    "model": {"model.safetensors": "a" * 64, "config.json": "b" * 64},
    "recipe": {"solver": {"name": "nested", "passes": 3}, "embeddings": True},
    "calibration": {"text": "c" * 64, "windows": 128},
    "seed": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    return contents(write_small(tmp_path_factory.mktemp("whole") / "out", FEW, fingerprint=FINGERPRINT))


def run(output: Path, source: Path) -> None:
    with CheckpointWriter(output, FINGERPRINT) as writer:
        fill_small(writer, source, FEW)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its wait status."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(pid, 0)[1]


def die_at(count: int, work: Callable[[], None]) -> None:
    """Kill this process the moment it asks the file system for its `count`-th lasting change."""
    left = [count]

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    work()


def test_killed_at_every_step(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """kill -9 before each change of the file system in turn: nothing or a whole checkpoint, the same bytes after."""
    source, kills = small_source(tmp_path / "source"), 0
    for count in range(500):
        output = tmp_path / f"out-{count}"
        status = in_child(lambda output=output, count=count: die_at(count, lambda: run(output, source)))
        if output.exists():
            assert contents(output) == whole
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not is_finished(output, FINGERPRINT):
            run(output, source)
        assert contents(output) == whole
        assert not work_directory(output).exists()
        shutil.rmtree(output)
    assert kills > 30


def test_killed_again_and_again(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """One run killed at random steps until it gets through; finished units are never written twice."""
    source, output = small_source(tmp_path / "source"), tmp_path / "out"
    rng, finished = random.Random(7), set()
    for _ in range(200):
        count = rng.randrange(3, 60)
        status = in_child(lambda count=count: die_at(count, lambda: run(output, source)))
        if not os.WIFSIGNALED(status):
            break
        if not output.exists():
            with CheckpointWriter(output, FINGERPRINT) as writer:
                assert finished <= writer.finished()
                finished = writer.finished()
        elif is_finished(output, FINGERPRINT):
            break
    assert finished
    assert contents(output) == whole


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from random_checkpoint import fill_small
from elastiq.checkpoint import CheckpointWriter, is_finished
FINGERPRINT = {fingerprint!r}
output = Path(sys.argv[1])
if not is_finished(output, FINGERPRINT):
    with CheckpointWriter(output, FINGERPRINT) as writer:
        print("open", flush=True)
        fill_small(writer, Path(sys.argv[2]), {few!r})
"""


def test_kill_a_real_process(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """kill -9 from outside at a random moment, then the same command again."""
    source, output = small_source(tmp_path / "source"), tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(path=[str(Path(__file__).parents[1])], few=FEW, fingerprint=FINGERPRINT))
    command = [sys.executable, str(script), str(output), str(source)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    with pytest.raises(ElastiqError, match="another process is writing it"):
        CheckpointWriter(output, FINGERPRINT)
    time.sleep(random.uniform(0.0, 0.1))
    process.kill()
    process.wait()
    if output.exists():
        assert contents(output) == whole
    subprocess.run(command, check=True, env=environment, timeout=300)
    assert contents(output) == whole
    assert not work_directory(output).exists()


def test_units_are_kept(tmp_path: Path) -> None:
    weights = small_unit("block-00001")
    with CheckpointWriter(tmp_path / "out", FINGERPRINT) as writer:
        assert writer.finished() == set()
        writer.write_unit("block-00001", weights, [row(site, weight) for site, weight in weights.items()])
    (work_directory(tmp_path / "out") / "units" / ".block-00000.safetensors.0123abcd.elastiq-tmp").write_bytes(b"half")
    (work_directory(tmp_path / "out") / "states.tmp").write_bytes(b"left by a killed run")
    with CheckpointWriter(tmp_path / "out", FINGERPRINT) as writer:
        assert writer.finished() == {"block-00001"}
        assert list(writer.read_unit("block-00001")) == ["model.1.up"]
        assert sorted(path.name for path in writer.work.rglob("*")) == [
            "block-00001.safetensors", "fingerprint.json", "made-by-elastiq", "tuned", "units",
        ]  # fmt: skip
    with CheckpointWriter(tmp_path / "out", {**FINGERPRINT, "seed": 1}, restart=True) as writer:
        assert writer.finished() == set()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", {}),
        pytest.raises(ElastiqError, match=r"out: another process is writing it; wait for it, or choose another output"),
    ):
        CheckpointWriter(tmp_path / "out", {})
    CheckpointWriter(tmp_path / "out", {}).close()


def test_the_dead_hold_no_lock(tmp_path: Path) -> None:
    ready, signal_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = CheckpointWriter(tmp_path / "out", {})
        os.write(signal_ready, b"x")
        time.sleep(600)
        writer.close()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(ElastiqError, match="another process is writing it"):
        CheckpointWriter(tmp_path / "out", {})
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    CheckpointWriter(tmp_path / "out", {}).close()


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({**FINGERPRINT, "seed": 2}, "seed was 0, is 2"),
    (
        {**FINGERPRINT, "recipe": {"solver": {"name": "nested", "passes": 2}, "embeddings": True}},
        "recipe.solver.passes was 3, is 2",
    ),
    (
        {**FINGERPRINT, "recipe": {"solver": {"name": "rtn"}, "embeddings": True}},
        "recipe.solver.name was 'nested', is 'rtn'; recipe.solver.passes was 3, is not set",
    ),
    (
        {**FINGERPRINT, "model": {"model.safetensors": "d" * 64, "config.json": "b" * 64}},
        "model.safetensors has changed",
    ),
    (
        {**FINGERPRINT, "model": {"model-1.safetensors": "d" * 64, "config.json": "b" * 64}},
        "model-1.safetensors is new; model.safetensors is gone",
    ),
    ({**FINGERPRINT, "calibration": {"text": "d" * 64, "windows": 128}}, "the calibration text has changed"),
    ({**FINGERPRINT, "calibration": {"text": "c" * 64, "windows": 64}}, "calibration.windows was 128, is 64"),
]


@pytest.mark.parametrize(("changed", "words"), CHANGES)
def test_another_run_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    output = tmp_path / "out"
    CheckpointWriter(output, FINGERPRINT).close()
    with pytest.raises(ElastiqError) as error:
        CheckpointWriter(output, changed)
    assert str(error.value) == (
        f"{output}: an unfinished run was made from something else: {words}; "
        "start over with --restart, or choose another output"
    )
    CheckpointWriter(output, FINGERPRINT).close()
    CheckpointWriter(output, changed, restart=True).close()
    with pytest.raises(ElastiqError, match="made from something else"):
        CheckpointWriter(output, FINGERPRINT)


def test_finished(tmp_path: Path, whole: dict[str, bytes]) -> None:
    output = tmp_path / "out"
    assert not is_finished(output, FINGERPRINT)
    output.mkdir()
    assert not is_finished(output, FINGERPRINT)
    write_small(output, FEW, fingerprint=FINGERPRINT)
    assert is_finished(output, FINGERPRINT)
    assert contents(output) == whole
    with pytest.raises(ElastiqError, match="already finished; choose another output, or start over with --restart"):
        CheckpointWriter(output, FINGERPRINT)
    with pytest.raises(ElastiqError) as error:
        is_finished(output, {**FINGERPRINT, "seed": 1})
    assert str(error.value) == (
        f"{output}: a checkpoint made from something else is there: seed was 0, is 1; "
        "start over with --restart, or choose another output"
    )
    with pytest.raises(ElastiqError, match="a checkpoint made from something else is there: seed was 0, is 1"):
        CheckpointWriter(output, {**FINGERPRINT, "seed": 1})
    (output / "plane-2.safetensors").unlink()
    with pytest.raises(ElastiqError, match=r"plane-2\.safetensors is missing or cut short"):
        is_finished(output, FINGERPRINT)


def test_restart_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    output = write_small(tmp_path / "out", fingerprint=FINGERPRINT)
    (output / "evaluation.json").write_text("{}")
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ElastiqError, match=r"holds thesis\.txt besides the checkpoint; move that away first"):
        CheckpointWriter(output, {"seed": 9}, restart=True)
    (output / "thesis.txt").unlink()
    source = small_source(tmp_path / "source")
    with CheckpointWriter(output, {"seed": 9}, restart=True) as writer:
        assert is_finished(output, FINGERPRINT)
        fill_small(writer, source)
    assert is_finished(output, {"seed": 9})
    assert not (output / "evaluation.json").exists()


@pytest.mark.parametrize("restart", [False, True])
def test_something_else_is_there(tmp_path: Path, restart: bool) -> None:
    directory, file = tmp_path / "photos", tmp_path / "file"
    directory.mkdir()
    (directory / "cat.jpg").write_bytes(b"miaow")
    file.write_bytes(b"text")
    for output in (directory, file):
        with pytest.raises(
            ElastiqError, match="holds something that is not an elastiq checkpoint; choose another output"
        ):
            CheckpointWriter(output, {}, restart=restart)
        with pytest.raises(ElastiqError, match="holds something that is not an elastiq checkpoint"):
            is_finished(output, {})
        assert not work_directory(output).exists()
    assert contents(directory) == {"cat.jpg": b"miaow"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, whole: dict[str, bytes]) -> None:
    source, output = small_source(tmp_path / "source"), tmp_path / "out"
    fsync, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 12:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    sentence = (
        "the disk is full; free some space" if number == errno.ENOSPC else r"cannot write .* \(Input/output error\)"
    )
    with pytest.raises(ElastiqError, match=rf"out: {sentence}.*then run the same command again"):
        run(output, source)
    assert not output.exists()
    run(output, source)
    assert contents(output) == whole


def test_the_result_reads(tmp_path: Path) -> None:
    reader = CheckpointReader(write_small(tmp_path / "out"))
    assert sorted(reader.manifest.matrices) == sorted({site.tensor for sites in SMALL.values() for site in sites})
    assert [r["name"] for r in reader.table] == [site.name for unit in sorted(SMALL) for site in SMALL[unit]]
    assert reader.info == {"windows": 3}
