"""The finished checkpoint is compared with the model before it is published."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import elastiq
from elastiq.core import ElastiqError
from elastiq.models import ModelSource
from elastiq.pipeline import guard

IDS = torch.randint(3, tiny.VOCAB - 4, (3, 32), generator=torch.Generator().manual_seed(1))


def quantized(model: Path, output: Path, **recipe: Any) -> Any:
    return elastiq.quantize(model, output, elastiq.recipes.rtn(**{"levels": (8,), **recipe}), IDS)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3", "mixtral"])
def test_a_right_checkpoint_passes(family: str, tmp_path: Path) -> None:
    model = tiny.make_model(family, tmp_path / "model", dtype=torch.float32)
    checked = quantized(model, tmp_path / "out", embeddings=True).checked
    assert checked.skipped is None and 0 < checked.gap < checked.bound / 2 and checked.seconds > 0


def lose_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()


def lose_the_factor(model: Any) -> None:
    model.get_input_embeddings().factor = 1.0


def give_zeros(model: Any) -> None:
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: 0 * output)


def give_nothing_finite(model: Any) -> None:
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output / 0)


MUTANTS = [
    ("gpt2", lose_biases, 8),
    ("gemma3", lose_the_factor, 8),
    ("llama", give_zeros, 8),
    ("llama", give_zeros, 2),
    ("llama", give_nothing_finite, 8),
]


@pytest.mark.parametrize(("family", "mutate", "bits"), MUTANTS)
@pytest.mark.parametrize("loader", ["_elastiq", "_transformers"])
def test_mutants_are_caught(
    family: str, mutate: Callable[[nn.Module], None], bits: int, loader: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def wrong(path: Path, width: int) -> nn.Module:
        model = right(path, width)
        mutate(model)
        return model

    right = getattr(guard, loader)
    monkeypatch.setattr(guard, loader, wrong)
    model = tiny.make_model(family, tmp_path / "model", dtype=torch.float32)
    if mutate is lose_biases:
        make_biases_large(model)
    name = {"_elastiq": "elastiq.load", "_transformers": "from_pretrained"}[loader]
    with pytest.raises(ElastiqError, match=rf"was not published, because its \w+, loaded by {name} at {bits} bits"):
        quantized(model, tmp_path / "out", levels=(bits,), embeddings=True)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "units").is_dir()


def make_biases_large(model: Path) -> None:
    """As trained ones are; those of tiny models are a tenth of what they are added to."""
    weights = load_file(model / "model.safetensors")
    large = {name: 10 * tensor if name.endswith("bias") else tensor for name, tensor in weights.items()}
    save_file(large, model / "model.safetensors", metadata={"format": "pt"})


def test_it_is_left_out_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_free_memory", lambda: 1000)
    model = tiny.make_model("llama", tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="elastiq"):
        checked = quantized(model, tmp_path / "out").checked
    assert checked.gap is None and "and 0.0 are free" in checked.skipped
    assert "the finished checkpoint was not compared with the model: loading it takes" in caplog.text


def test_logits_that_are_all_equal_are_nothing_to_compare_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.make_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros_like(tensors["lm_head.weight"])}, model / "model.safetensors")
    with caplog.at_level(logging.WARNING, "elastiq"):
        quantized(model, tmp_path / "out")
    assert "the model's own logits are all equal" in caplog.text


def test_a_config_that_is_not_read_back_is_refused_before_the_work(tmp_path: Path) -> None:
    source = ModelSource(tiny.make_model("llama", tmp_path / "model"))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    guard.check_config(source, written)
    with pytest.raises(ElastiqError, match=r"hidden_size of config\.json is 64 and would be read back as 128"):
        guard.check_config(source, {**written, "hidden_size": 128})
    with pytest.raises(ElastiqError, match=r"its config\.json cannot be read back once it is written"):
        guard.check_config(source, {**written, "model_type": "no_such_model"})


def test_the_median_is_compared() -> None:
    wanted = torch.randn(1, 9, 20)
    found = wanted.clone()
    found[0, :4] = 0
    assert guard.relative_gap(found + 3.0, wanted) < 1e-5  # neither a shift of all logits nor a few positions
    assert guard.relative_gap(0 * wanted, wanted) == pytest.approx(1.0)
    assert guard.relative_gap(wanted / 0, wanted) == float("inf")
