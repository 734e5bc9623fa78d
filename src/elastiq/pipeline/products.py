"""What reaches every matrix of a block, and how much each token counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..core import ElastiqError, Seen, Site, Stats, TokenWeights


class Products:
    """Sees the input and output of every matrix, and adds the input to the statistics, weighed as `weights` says.

    weights: None counts every token once, and adds a batch as it is seen.
    """

    def __init__(self, stats: Mapping[str, Stats], weights: TokenWeights | None) -> None:
        self._stats, self._weights = stats, weights
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._attention: Tensor | None = None

    def of_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.add(name, args[0], output)

    def of_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of any module: keeps the probabilities [windows, heads, queries, keys] that attention returns."""
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Tensor) and part.dim() == 4 and part.shape[2] == part.shape[3]:
                total = part.detach().float().sum(dim=1, keepdim=True)
                self._attention = total if self._attention is None else self._attention + total

    def add(self, name: str, x: Tensor, output: Tensor) -> None:
        if self._weights is None or (self._weights.gradients and not output.requires_grad):
            self._stats[name].update(x)
        elif self._weights.gradients:
            self._seen.append((name, x.detach(), output))
        elif self._weights.attention:
            self._seen.append((name, x.detach().clone(), output))  # the block may write in it before it ends
        else:
            self._stats[name].update(x, self._weights.weigh(Seen(x)))

    def settle(self, output: Tensor, generator: torch.Generator) -> None:
        """End of a batch: `output` is the block's. Raises ElastiqError where the attention that the weights look at
        was not seen, or is not that of a matrix's rows."""
        if not self._seen or self._weights is None:
            return
        gradients: Sequence[Tensor | None] = [None] * len(self._seen)
        if self._weights.gradients:
            direction = torch.randn(output.shape, generator=generator).to(output)
            gradients = torch.autograd.grad(output, [y for _, _, y in self._seen], direction, allow_unused=True)
        for (name, x, _), gradient in zip(self._seen, gradients, strict=True):
            if self._weights.attention:
                self._check_attention(name, x)
            stats, counts = self._stats[name], self._weights.weigh(Seen(x, gradient, self._attention))
            stats.update(x, counts, gradient if stats.gradients else None)
        self._seen.clear()
        self._attention = None

    def _check_attention(self, name: str, x: Tensor) -> None:
        assert self._weights is not None
        if self._attention is None:
            raise ElastiqError(
                f"{self._weights.name}: the block of {name} shows no attention probabilities; "
                "take other token weights, such as block-output"
            )
        if x.shape[:-1] != (self._attention.shape[0], self._attention.shape[-1]):
            raise ElastiqError(
                f"{self._weights.name}: {name} is given {list(x.shape[:-1])} rows and attention speaks of "
                f"{[self._attention.shape[0], self._attention.shape[-1]]} tokens; "
                "take other token weights, such as block-output"
            )


_MULTIPLICATIONS = (nn.functional.linear, Tensor.matmul, torch.matmul, Tensor.__matmul__)
"""x first, then the matrix, [out, in] for the first and [in, out] for the others."""


class ExpertProducts(TorchFunctionMode):
    """Sees every multiplication by one expert of a fused parameter."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], products: Products) -> None:
        super().__init__()
        self._products = products
        self._fused = {
            model.get_parameter(site.tensor).untyped_storage().data_ptr(): site
            for site in sites
            if site.expert is not None
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _MULTIPLICATIONS:
            x, weight = [*args, *kwargs.values()][:2]
            site = self._fused.get(weight.untyped_storage().data_ptr())
            if site is not None:
                expert = weight.storage_offset() // site.num_weights
                self._products.add(f"{site.tensor}.{expert}", x, output)
        return output
