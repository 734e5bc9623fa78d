"""Calls of a model and changes of its widths take turns."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import write_random
from tiny import build_model, make_model
from transformers import AutoModelForCausalLM

import elastiq
from elastiq.core import ElastiqError
from elastiq.runtime.turns import Turns

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turns")
    write_random(build_model("llama"), make_model("llama", root / "model"), root / "nested")
    return root / "nested"


@pytest.mark.parametrize("loader", [elastiq.load, AutoModelForCausalLM.from_pretrained])
def test_every_answer_belongs_to_one_width(checkpoint: Path, loader: Any) -> None:
    """A call that meets a change after its first block, as another thread may make one at any time."""
    model = loader(checkpoint).eval()
    expected = {}
    for bits in (2, 8):
        elastiq.set_bits(model, bits)
        expected[bits] = model(IDS).logits
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        changes: list[Any] = []

        def change(*_: Any) -> None:
            changes.append(pool.submit(lambda: (begun.set(), elastiq.set_bits(model, 2))))
            begun.wait(10)
            threading.Event().wait(0.05)  # as long as the change would take were it not made to wait

        handle = model.model.layers[0].register_forward_hook(change)
        found = model(IDS).logits
        handle.remove()
        changes[0].result(10)
    assert torch.equal(found, expected[8])
    assert torch.equal(model(IDS).logits, expected[2])


def test_threads_that_ask_and_one_that_changes(checkpoint: Path) -> None:
    model: Any = elastiq.load(checkpoint, 8)
    known = []
    for bits in (2, 8):
        elastiq.set_bits(model, bits)
        known.append(model(IDS).logits)

    def ask(_: int) -> bool:
        answer = model(IDS).logits
        return any(torch.equal(answer, one) for one in known)

    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(ask, range(30))
        for index in range(15):
            elastiq.set_bits(model, (2, 8)[index % 2])
        assert all(answers)


def test_a_change_within_a_call_of_its_own_thread_is_refused(checkpoint: Path) -> None:
    model: Any = elastiq.load(checkpoint, 8)
    before = model(IDS).logits
    handle = model.model.register_forward_hook(lambda *_: elastiq.set_bits(model, 2))
    with pytest.raises(ElastiqError, match="set_bits: this thread is within a call of the model; set widths after it"):
        model(IDS)
    handle.remove()
    assert torch.equal(model(IDS).logits, before)
    elastiq.set_bits(model, 2)


def test_copies_take_their_own_turns(checkpoint: Path) -> None:
    model: Any = elastiq.load(checkpoint, 8)
    twin = copy.deepcopy(model)
    handle = model.model.register_forward_hook(lambda *_: elastiq.set_bits(twin, 2))
    before = model(IDS).logits
    handle.remove()
    assert torch.equal(model(IDS).logits, before) and not torch.equal(twin(IDS).logits, before)
    assert isinstance(pickle.loads(pickle.dumps(Turns())), Turns)
