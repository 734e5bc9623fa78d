"""A tiny model and a checkpoint of random codes made from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from random_checkpoint import write_random
from transformers import AutoModelForCausalLM

TEXT = "".join(f"{i}: the quick brown fox, {i * 7919 % 1000} lazy dogs;\n" for i in range(60))


@pytest.fixture(scope="session")
def random_checkpoint(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random codes of the tiny llama; do not write in it."""
    source = tiny_model("llama")
    output = tmp_path_factory.mktemp("random") / "nested"
    write_random(AutoModelForCausalLM.from_pretrained(source), source, output)
    return output


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sample.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file
