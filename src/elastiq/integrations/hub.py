"""Checkpoints on the Hugging Face hub: pushed as they are, pulled with no more planes than a width needs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..checkpoint import CheckpointReader
from ..checkpoint.files import disk_errors, read_checksums, read_json
from ..checkpoint.manifest import Manifest
from ..checkpoint.names import (
    BASE,
    CARD,
    CHECKSUMS,
    CONFIG,
    EVALUATION,
    FINGERPRINT,
    INDEX,
    LEVELS,
    MADE_LATER,
    RECIPE,
    SENSITIVITY,
    TASKS,
    plane_file,
    travels_along,
)
from ..checkpoint.publish import WorkDirectory, is_vacant, new_place, remove
from ..checkpoint.slice import narrow
from ..core import MAX_BITS, ElastiqError, library_errors
from ..evaluate import write_card

__all__ = ["pull", "push"]

log = logging.getLogger("elastiq")

_DOCUMENTS = frozenset(
    {BASE, CONFIG, RECIPE, LEVELS, FINGERPRINT, INDEX, CHECKSUMS, CARD, EVALUATION, TASKS, SENSITIVITY}
)


def push(path: str | Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the checkpoint `path` as one commit to the model repository `repo`; the address of the commit.

    Files that do not belong to a checkpoint stay behind. The repository is made if there is none, `private` or not; so
    is the branch `revision`. Who may write is the business of the hub's own login (`hf auth login`).
    Raises ElastiqError for a checkpoint that is damaged or lacks planes, and for what the hub refuses.
    """
    reader = CheckpointReader(path)
    for plane in range(1, reader.manifest.planes + 1):
        reader.require_plane(plane)
    names = _belonging((file.name for file in reader.path.iterdir() if file.is_file()), reader.manifest.planes)
    for name in sorted(reader.digests.keys() & names):
        reader.check(name)
    with _said_by_the_hub(repo):
        api = HfApi(library_name="elastiq")
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        widths = ", ".join(map(str, reader.levels))
        commit = api.upload_folder(
            repo_id=repo, folder_path=reader.path, allow_patterns=sorted(names), revision=revision,
            commit_message=f"Nested checkpoint, levels {widths}",
        )  # fmt: skip
    return str(commit.commit_url)


def pull(repo: str, output: str | Path, bits: int | None = None, *, revision: str | None = None) -> None:
    """Download the checkpoint in the model repository `repo` to the new directory `output`.

    bits: the widest width it shall give; planes beyond are not downloaded, and the directory becomes what `elastiq
    slice` would have made, beside what was measured of the whole. Files wait beside `output` until all are there and
    agree with their checksums: a run that was stopped goes on with the files that are missing.
    What no checksum covers stays on the hub, except the card and what was measured, which are no part of the model.
    Raises ElastiqError for a repository that holds no checkpoint or cannot give `bits`, for what the hub refuses, and
    where another process is writing `output`.
    """
    place = new_place(output)
    if not is_vacant(place):
        raise ElastiqError(f"{output}: exists already; choose another output")
    with disk_errors(Path(output), "pull again"), WorkDirectory(place, "pulling") as work:
        try:
            result = work.path / "result"
            work.clear({result.name})
            if result.is_symlink():
                raise ElastiqError(f"{result}: is a link, which elastiq did not make; remove it")
            result.mkdir(exist_ok=True)
            _download(repo, result, bits, revision)
            reader = CheckpointReader(result)
            for name in sorted(reader.digests):
                if (result / name).is_file():
                    reader.check(name)
            if bits is not None and bits < reader.manifest.planes:
                narrow(result, reader, bits)
                write_card(result)
            work.publish(result)
        except BaseException:
            if not any(file.suffix in (".safetensors", ".incomplete") for file in work.path.rglob("*")):
                work.remove()  # nothing that another run would be spared
            raise
        work.remove()


def _download(repo: str, result: Path, bits: int | None, revision: str | None) -> None:
    """Fill `result` with the files of one commit that `bits` needs, and with nothing else."""
    with _said_by_the_hub(repo):
        api = HfApi(library_name="elastiq")
        info = api.model_info(repo, revision=revision)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        if not {CONFIG, CHECKSUMS, BASE} <= there:
            raise ElastiqError(f"{repo}: holds no elastiq checkpoint; give a repository that elastiq push made")

        def fetch(names: Iterable[str]) -> None:
            patterns = sorted(names)
            api.snapshot_download(repo, revision=info.sha, local_dir=result, allow_patterns=patterns, max_workers=4)

        fetch([CONFIG, CHECKSUMS])
        manifest = Manifest.from_config(read_json(result / CONFIG), repo)
        if bits is not None and bits not in manifest.widths:
            widths = ", ".join(map(str, manifest.widths))
            raise ElastiqError(f"{repo}: it can be read at {widths} bits, not {bits}; ask for one of these")
        planes = min(bits or MAX_BITS, manifest.planes)
        wanted = _covered(repo, _belonging(there, planes), _belonging(read_checksums(result), planes), planes)
        fetch(wanted)
    remove(result / ".cache")  # without it a file that turns out damaged is fetched again
    for path in result.iterdir():
        if path.name not in wanted:
            remove(path)


def _covered(repo: str, there: set[str], recorded: set[str], planes: int) -> set[str]:
    """Which files to fetch: those with a checksum, and what is made of a checkpoint later.

    Raises ElastiqError where one of them is not there, or no checksum covers what every checkpoint has.
    """
    for name in sorted({BASE, CONFIG, *map(plane_file, range(1, planes + 1))} - recorded):
        raise ElastiqError(f"{repo}: its checksums.json does not cover {name}; push the original again")
    for name in sorted(recorded - there):
        raise ElastiqError(f"{repo}: it lacks {name}, which its checksums.json lists; push the original again")
    later = {CHECKSUMS} | (there & MADE_LATER)
    if left := sorted(there - recorded - later):
        log.warning("%s: no checksum covers %s, left on the hub", repo, ", ".join(left))
    return recorded | later


def _belonging(names: Iterable[str], planes: int) -> set[str]:
    """Which of some files are those of a checkpoint read at up to `planes` planes."""
    known = _DOCUMENTS | {plane_file(plane) for plane in range(1, planes + 1)}
    return {name for name in names if name in known or travels_along(name)}


@contextmanager
def _said_by_the_hub(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    with library_errors(f"{repo}: the hub says no", "mend that and run the command again"):
        try:
            yield
        except RevisionNotFoundError:
            raise ElastiqError(f"{repo}: it has no such revision; give a branch, tag or commit of it") from None
        except RepositoryNotFoundError:
            raise ElastiqError(f"{repo}: no such repository, or none you may read; run hf auth login") from None
