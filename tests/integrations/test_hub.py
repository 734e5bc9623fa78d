"""Checkpoints through a hub on this machine, by the hub's own client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub
from random_checkpoint import contents, write_small
from typer.testing import CliRunner

from elastiq import ElastiqError
from elastiq.checkpoint import CheckpointReader, slice_checkpoint
from elastiq.checkpoint.publish import WorkDirectory
from elastiq.cli import app
from elastiq.integrations.hub import pull, push

REPO = "me/nested"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    path = write_small(tmp_path / "nested")
    (path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    (path / "secret.pem").write_text("not for the world")
    return path


def test_pushed_and_pulled_whole(hub: Hub, nested: Path, tmp_path: Path) -> None:
    assert push(nested, REPO, private=True).startswith(f"{hub.address}/{REPO}/commit/")
    assert set(hub.files[REPO]) == {file.name for file in nested.iterdir()} - {"secret.pem"}
    uploaded = hub.sent["uploaded"]
    push(nested, REPO)
    assert hub.sent["uploaded"] == uploaded
    pull(REPO, tmp_path / "out")
    assert contents(tmp_path / "out") == {n: data for n, data in contents(nested).items() if n != "secret.pem"}
    with pytest.raises(ElastiqError, match="exists already; choose another output"):
        pull(REPO, tmp_path / "out")


def test_a_width_takes_only_its_files(hub: Hub, nested: Path, tmp_path: Path) -> None:
    push(nested, REPO)
    hub.files[REPO] |= {"evil.py": b"import os", "pytorch_model.bin": b"\x80\x04pickle", "a/../../b.json": b"{}"}
    done = CliRunner().invoke(app, ["pull", REPO, "-o", str(tmp_path / "small"), "--bits", "3"])
    assert done.exit_code == 0, done.output
    assert "small: 1, 2, 3 bits, " in done.output.replace("\n", "")
    assert not {"plane-4.safetensors", "evil.py", "pytorch_model.bin"} & hub.sent.keys()
    slice_checkpoint(nested, 3, tmp_path / "sliced")
    pulled = contents(tmp_path / "small")
    assert b"Mine." in pulled.pop("README.md")
    assert pulled == contents(tmp_path / "sliced")
    assert sorted(file.name for file in tmp_path.iterdir() if "pulling" in file.name) == []


def test_a_broken_connection_goes_on_where_it_broke(
    hub: Hub, nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64)  # what the client keeps of a broken one
    push(nested, REPO)
    size = len(hub.files[REPO]["plane-2.safetensors"])
    hub.cut["plane-2.safetensors"] = size // 2
    pull(REPO, tmp_path / "out", 3)
    assert size <= hub.sent["plane-2.safetensors"] < size + 64
    assert CheckpointReader(tmp_path / "out").available == (1, 2, 3)


def test_a_stopped_pull_goes_on(hub: Hub, nested: Path, tmp_path: Path) -> None:
    push(nested, REPO)
    hub.gone.add("plane-3.safetensors")
    with pytest.raises(ElastiqError, match=r"me/nested: the hub says no \(.*run the command again"):
        pull(REPO, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    before = hub.sent.copy()
    hub.gone.clear()
    pull(REPO, tmp_path / "out", 3)
    assert hub.sent["plane-3.safetensors"] == len(hub.files[REPO]["plane-3.safetensors"])
    assert all(hub.sent[f"plane-{plane}.safetensors"] == before[f"plane-{plane}.safetensors"] for plane in (1, 2))


def test_damage_on_the_way_is_seen_and_mended(hub: Hub, nested: Path, tmp_path: Path) -> None:
    push(nested, REPO)
    whole = hub.files[REPO]["plane-2.safetensors"]
    hub.files[REPO]["plane-2.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(ElastiqError, match=r"plane-2\.safetensors: altered"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.files[REPO]["plane-2.safetensors"] = whole
    pull(REPO, tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").available[-1] == 8


def test_refusals(hub: Hub, nested: Path, tmp_path: Path) -> None:
    push(nested, REPO)
    hub.files["me/other"] = {"config.json": b"{}", "model.safetensors": b""}
    config = json.loads(hub.files[REPO]["config.json"])
    config["quantization_config"]["modules"]["../../up"] = next(iter(config["quantization_config"]["modules"].values()))
    hub.files["me/hostile"] = hub.files[REPO] | {"config.json": json.dumps(config).encode()}
    for repo, settings, message in (
        ("me/absent", {}, "me/absent: no such repository, or none you may read"),
        ("me/other", {}, "me/other: holds no elastiq checkpoint"),
        ("me/hostile", {}, "quantization_config in config.json"),
        (REPO, {"bits": 9}, "it can be read at 1, 2, 3, 4, 5, 6, 7, 8 bits, not 9"),
        (REPO, {"revision": "gone"}, "it has no such revision"),
        ("not a name//", {}, "not a name//: the hub says no"),
    ):
        with pytest.raises(ElastiqError, match=message) as caught:
            pull(repo, tmp_path / "out", **settings)
        assert "\n" not in str(caught.value) and not (tmp_path / "out.pulling").exists()
    (nested / "plane-7.safetensors").unlink()
    (nested / "plane-8.safetensors").unlink()
    with pytest.raises(ElastiqError, match=r"plane-7\.safetensors is missing"):
        push(nested, REPO)
    assert not (tmp_path / "out").exists()


def test_what_no_checksum_covers_stays_on_the_hub(
    hub: Hub, nested: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    push(nested, REPO)
    hub.files[REPO]["added_tokens.json"] = b"{{ evil }}"
    with caplog.at_level("WARNING", logger="elastiq"):
        pull(REPO, tmp_path / "out")
    assert f"{REPO}: no checksum covers added_tokens.json, left on the hub" in caplog.text
    assert "added_tokens.json" not in hub.sent and not (tmp_path / "out" / "added_tokens.json").exists()
    digests = json.loads(hub.files[REPO]["checksums.json"])
    del digests["files"]["plane-2.safetensors"]
    hub.files["me/uncovered"] = hub.files[REPO] | {"checksums.json": json.dumps(digests).encode()}
    hub.files["me/lacking"] = {n: data for n, data in hub.files[REPO].items() if n != "recipe.json"}
    for repo, message in (
        ("me/uncovered", r"its checksums\.json does not cover plane-2\.safetensors; push the original again"),
        ("me/lacking", r"it lacks recipe\.json, which its checksums\.json lists; push the original again"),
    ):
        with pytest.raises(ElastiqError, match=message):
            pull(repo, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_one_pull_at_a_time_and_only_into_our_own(hub: Hub, nested: Path, tmp_path: Path) -> None:
    push(nested, REPO)
    with WorkDirectory(tmp_path / "out", "pulling") as held:
        with pytest.raises(ElastiqError, match="another process is writing it; wait for it"):
            pull(REPO, tmp_path / "out")
        held.remove()
    (tmp_path / "out.pulling").mkdir()
    (tmp_path / "out.pulling" / "thesis.txt").write_text("years of work")
    with pytest.raises(ElastiqError, match=r"out\.pulling: is in the way and does not bear elastiq's mark"):
        pull(REPO, tmp_path / "out")
    assert (tmp_path / "out.pulling" / "thesis.txt").read_text() == "years of work"
