"""Continue a text token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core import ElastiqError
from ..text import check_ids


@torch.inference_mode()
def generate(
    model: Any,
    tokens: Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[int]:
    """Tokens after `tokens` [1, n], one by one as they are found; a token of `stop` comes out and ends them.

    What `model.generate` does for one sequence, without what that costs per token. temperature: 0 takes the most
    probable token. top_p: sample among the most probable tokens that hold this much of the probability. seed: of the
    sampling; None draws from torch's own generator. stop: None is what the model's generation settings say.

    Raises ElastiqError where the arguments make no sense, for a token that the model does not have, and where the
    context is full before the first token.
    """
    context = getattr(model.config, "max_position_embeddings", None) or tokens.shape[-1] + max_new_tokens
    if tokens.dim() != 2 or len(tokens) != 1 or not tokens.numel():
        raise ElastiqError(f"generate: tokens are {list(tokens.shape)}; one sequence [1, n] is needed")
    if tokens.shape[1] >= context:
        raise ElastiqError(
            f"the prompt has {tokens.shape[1]} tokens, the model's context {context}; shorten the prompt"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ElastiqError(f"generate: temperature={temperature} must be at least 0, top_p={top_p} above 0 up to 1")
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    check_ids(model, tokens, "generate")
    ends = _stop_tokens(model) if stop is None else frozenset(stop)
    cache = DynamicCache(config=model.config)
    given = tokens.to(model.device)
    for _ in range(min(max_new_tokens, context - tokens.shape[1])):
        logits = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = _choose(logits.float(), temperature, top_p, generator)
        yield token
        if token in ends:
            return
        given = torch.tensor([[token]], device=model.device)


def _stop_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset([] if end is None else [end] if isinstance(end, int) else end)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token by its `logits` [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        sorted_, order = probabilities.sort(descending=True)
        beyond = sorted_.cumsum(0) - sorted_ >= top_p
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))
