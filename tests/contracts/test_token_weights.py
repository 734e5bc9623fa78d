"""What registered token weights must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastiq.core import ElastiqError, Seen, Step, TokenWeights, step_from_dict
from elastiq.models import ModelSource, build_skeleton, discover
from elastiq.pipeline import BlockStream
from elastiq.token_weights import AttentionConcentration, BlockOutput, Uniform

CASES: list[TokenWeights] = [Uniform(), BlockOutput(), AttentionConcentration(), AttentionConcentration(0.2)]
WINDOWS, TOKENS, HEADS = 3, 7, 2


def seen(seed: int = 0) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(WINDOWS, HEADS, TOKENS, TOKENS, generator=generator)
    future = torch.ones(TOKENS, TOKENS).triu(1).bool()
    return Seen(
        torch.randn(WINDOWS, TOKENS, 5, generator=generator),
        torch.randn(WINDOWS, TOKENS, 4, generator=generator),
        logits.masked_fill(future, -torch.inf).softmax(-1),
    )


def test_every_registered_member_has_a_case() -> None:
    assert set(Step.registry["token-weights"]) == {type(case).name for case in CASES}


@pytest.mark.parametrize("weights", CASES, ids=str)
def test_contract(weights: TokenWeights) -> None:
    counts = weights.weigh(seen())
    assert step_from_dict("token-weights", weights.to_dict()) == weights
    if counts is None:
        return
    assert counts.shape == (WINDOWS, TOKENS)
    assert bool(torch.isfinite(counts).all()) and bool((counts >= 0).all()) and float(counts.sum()) > 0
    again = weights.weigh(seen())
    assert again is not None and torch.equal(counts, again)


def test_what_is_not_asked_for_is_not_looked_at() -> None:
    whole = seen()
    for weights in CASES:
        given = Seen(
            whole.x, whole.gradient if weights.gradients else None, whole.attention if weights.attention else None
        )
        first, second = weights.weigh(given), weights.weigh(whole)
        assert (first is None and second is None) or torch.equal(first, second)  # type: ignore[arg-type]


def test_attention_concentration_against_loops() -> None:
    """RSQ's definition token by token, in Python's own double precision."""
    attention, least = seen().attention, 0.2
    assert attention is not None
    found = AttentionConcentration(least).weigh(seen())
    assert found is not None
    for window in range(WINDOWS):
        received = [
            sum(float(attention[window, head, query, key]) for head in range(HEADS) for query in range(TOKENS))
            for key in range(TOKENS)
        ]
        low, high = min(received), max(received)
        counts = [least + (1 - least) * (value - low) / (high - low) for value in received]
        expected = [TOKENS * count / sum(counts) for count in counts]
        assert found[window].tolist() == pytest.approx(expected, rel=1e-5)
        assert min(counts) == pytest.approx(least) and max(counts) == pytest.approx(1)


def stream_of(directory: Path, weights: TokenWeights, ids: torch.Tensor, needs: str = "hessian") -> BlockStream:
    source = ModelSource(directory)
    model = build_skeleton(source, torch.float32)
    if weights.attention:
        model.set_attn_implementation("eager")
    return BlockStream(model, source, discover(model), ids, frozenset({needs}), token_weights=weights)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_block_is_weighed_by_its_own_attention(family: str, tiny_model: Callable[[str], Path]) -> None:
    """Hessians of block 1 against the whole model's inputs and attention, in double precision."""
    weights, ids = AttentionConcentration(), torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(3))
    stream = stream_of(tiny_model(family), weights, ids)
    layout = stream.layout
    stream.advance(0)
    statistics = stream.collect(1)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(family), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs: dict[str, torch.Tensor] = {}
    for site in layout.at(1):
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda module, args, name=site.name: inputs.__setitem__(name, args[0].detach())
        )
    with torch.no_grad():
        received = model(ids, output_attentions=True).attentions[1].double().sum(dim=(1, 2))
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    counts = 0.005 + 0.995 * (received - low) / (high - low)
    counts = (counts / counts.mean(1, keepdim=True)).flatten()
    for site in layout.at(1):
        rows = inputs[site.name].flatten(0, 1).double()
        expected = (rows * counts[:, None]).T @ rows / counts.sum()
        torch.testing.assert_close(statistics[site.name].mean_hessian().double(), expected, rtol=1e-3, atol=1e-6)


def test_tokens_are_weighed_only_for_statistics_of_errors(tiny_model: Callable[[str], Path]) -> None:
    """A recipe that asks for ranges alone pays for no backward pass."""
    ids = torch.randint(1, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    for needs, weighed in (("abs_max", False), ("hessian", True)):
        stream = stream_of(tiny_model("llama"), BlockOutput(), ids, needs)
        site = stream.layout.at(0)[0].name
        assert (stream.collect(0)[site].total != 16.0) == weighed


def test_what_shows_no_attention_is_refused(tiny_model: Callable[[str], Path]) -> None:
    ids = torch.randint(1, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    source = ModelSource(tiny_model("llama"))
    model = build_skeleton(source, torch.float32)
    model.set_attn_implementation("sdpa")
    stream = BlockStream(
        model, source, discover(model), ids, frozenset({"hessian"}), token_weights=AttentionConcentration()
    )
    with pytest.raises(ElastiqError, match=r"the block of .*q_proj shows no attention probabilities; take other"):
        stream.collect(0)


def test_experts_are_refused(tiny_model: Callable[[str], Path]) -> None:
    ids = torch.randint(1, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    stream = stream_of(tiny_model("mixtral"), AttentionConcentration(), ids)
    with pytest.raises(ElastiqError, match=r"experts.* is given .* rows and attention speaks of \[2, 8\] tokens"):
        stream.collect(0)
