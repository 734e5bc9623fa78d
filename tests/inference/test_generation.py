"""Continuing a text: the tokens of transformers' own loop, sampled as asked, ended where they must end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, build_model
from transformers import AutoConfig, AutoModelForCausalLM

import elastiq
from elastiq import ElastiqError
from elastiq.inference.generation import _choose

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])


@pytest.fixture(scope="module")
def llama() -> Any:
    return build_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model: Any = build_model(family)
    expected = model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = list(elastiq.generate(model, PROMPT, max_new_tokens=12, stop=()))
    assert found == expected[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["mamba", "rwkv", "openai-gpt"])
def test_a_model_that_keeps_its_past_elsewhere_answers_by_its_own_loop(family: str) -> None:
    sizes: dict[str, Any] = {
        "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64, "intermediate_size": 96},
        "openai-gpt": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    }
    config = AutoConfig.for_model(family, vocab_size=260, bos_token_id=None, eos_token_id=None, **sizes[family])
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    given = PROMPT
    for _ in range(6):  # the naive twin: the whole text again for every token
        with torch.no_grad():
            given = torch.cat([given, model(input_ids=given).logits[:, -1:].argmax(-1)], 1)
    expected = given[0, PROMPT.shape[1] :].tolist()
    assert list(elastiq.generate(model, PROMPT, max_new_tokens=6, stop=())) == expected
    end = expected[3]
    assert list(elastiq.generate(model, PROMPT, max_new_tokens=6, stop=(end,))) == expected[: expected.index(end) + 1]
    sampled = [list(elastiq.generate(model, PROMPT, max_new_tokens=6, temperature=9.0, seed=3, stop=())) for _ in "ab"]
    assert sampled[0] == sampled[1] != expected


def test_a_prompt_of_one_token(llama: Any) -> None:
    expected = llama.generate(PROMPT[:, :1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(elastiq.generate(llama, PROMPT[:, :1], max_new_tokens=6, stop=())) == expected[0, 1:].tolist()


def test_it_ends_with_a_stop_token_or_a_full_context(llama: Any) -> None:
    free = list(elastiq.generate(llama, PROMPT, max_new_tokens=12, stop=()))
    first = next(index for index, token in enumerate(free) if token not in free[:index] and index > 2)
    assert list(elastiq.generate(llama, PROMPT, max_new_tokens=12, stop=(free[first],))) == free[: first + 1]
    llama.generation_config.eos_token_id = [free[first], 259]
    assert list(elastiq.generate(llama, PROMPT, max_new_tokens=12)) == free[: first + 1]
    llama.generation_config.eos_token_id = None
    assert len(list(elastiq.generate(llama, torch.arange(250)[None], max_new_tokens=99))) == 6


def test_the_same_seed_gives_the_same_tokens(llama: Any) -> None:
    def sample(seed: int | None, **settings: float) -> list[int]:
        return list(elastiq.generate(llama, PROMPT, max_new_tokens=12, temperature=1.0, seed=seed, stop=(), **settings))

    assert sample(1) == sample(1) != sample(2)
    torch.manual_seed(5)
    drawn = sample(None)
    torch.manual_seed(5)
    assert sample(None) == drawn
    assert sample(1, top_p=1e-9) == list(elastiq.generate(llama, PROMPT, max_new_tokens=12, stop=()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_cut_at_top_p(temperature: float) -> None:
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.9])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[_choose(logits, temperature, 0.8, generator)] += 1
    probabilities = torch.softmax(logits.double() / temperature, 0)
    order = sorted(range(5), key=lambda i: -probabilities[i])
    kept: list[int] = []
    while sum(probabilities[i] for i in kept) < 0.8:
        kept.append(order[len(kept)])
    expected = torch.tensor([probabilities[i] if i in kept else 0.0 for i in range(5)])
    assert (counts / 4000 - expected / expected.sum()).abs().max() < 0.03
    assert not counts[[i for i in range(5) if i not in kept]].any()


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "one sequence"),
        (torch.zeros(2, 4, dtype=torch.long), {}, "one sequence"),
        (torch.zeros(1, 256, dtype=torch.long), {}, "has 256 tokens, the model's context 256; shorten the prompt"),
        (torch.tensor([[3, 260]]), {}, "generate: the token id 260 is not among the 260 rows of the model's embedding"),
        (PROMPT, {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        (PROMPT, {"top_p": 0.0}, "top_p=0.0 above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    llama: Any, tokens: torch.Tensor, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ElastiqError, match=message):
        next(elastiq.generate(llama, tokens, **settings))
