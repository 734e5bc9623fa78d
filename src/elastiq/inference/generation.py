"""Continue a text token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ..core import ElastiqError
from ..runtime import takes, with_cache
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

    What `model.generate` does for one sequence, without what that costs per token; a model that does not keep its past
    in the cache it is given answers by its own `generate`, all tokens at once. temperature: 0 takes the most
    probable token. top_p: sample among the most probable tokens that hold this much of the probability. seed: of the
    sampling; None draws from torch's own generator. stop: None is what the model's generation settings say.

    Raises ElastiqError where the arguments make no sense, for a token that the model does not have, and where the
    context is full before the first token.
    """
    context = getattr(model.config, "max_position_embeddings", None) or 0
    if context <= 0:  # XLNet says -1: as long as one likes
        context = tokens.shape[-1] + max_new_tokens
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
    last = {"logits_to_keep": 1} if takes(type(model).forward, "logits_to_keep") else {}
    most = min(max_new_tokens, context - tokens.shape[1])
    for index in range(most):
        logits = model(input_ids=given, use_cache=True, **with_cache(model, cache), **last).logits[0, -1]
        if index == 0 and _length(cache) != tokens.shape[1]:
            choice = _Choice(temperature, top_p, generator)
            yield from _by_own_loop(model, tokens, most, choice, ends)
            return
        token = _choose(logits.float(), temperature, top_p, generator)
        yield token
        if token in ends:
            return
        given = torch.tensor([[token]], device=model.device)


def _length(cache: DynamicCache) -> int | None:
    """Positions in the cache; None where it cannot tell, having no layer of attention or no layer at all."""
    try:
        return cache.get_seq_length()
    except (ValueError, IndexError, AttributeError, NotImplementedError):
        return None


class _Choice(LogitsProcessor):
    """Leaves the token that `_choose` takes, so that transformers' greedy search takes it too."""

    def __init__(self, temperature: float, top_p: float, generator: torch.Generator | None) -> None:
        self._arguments = temperature, top_p, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = _choose(scores[0].float(), *self._arguments)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, token] = 0
        return chosen


def _by_own_loop(model: Any, tokens: Tensor, most: int, choice: _Choice, ends: frozenset[int]) -> list[int]:
    """What the model's own `generate` adds to `tokens`."""
    given = tokens.to(model.device)
    found = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False, num_beams=1,
        logits_processor=LogitsProcessorList([choice]), eos_token_id=list(ends) or None, pad_token_id=0,
    )  # fmt: skip
    added: list[int] = found[0, tokens.shape[1] :].tolist()
    return added


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
