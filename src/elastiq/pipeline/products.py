"""What reaches every matrix of a block, and how much each token counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..core import Site, Stats


class Products:
    """Sees the input and output of every matrix, and adds the input to the statistics.

    weighted: a token counts for a matrix by how far the block's output moves when the matrix's output does at that
    token: the squared norm of the gradient, there, of the block's output times a random direction (a one-sample
    Hutchinson estimate of the Jacobian's norm). Close to GuidedQuant (2505.07004) and the token importance of RSQ
    (2503.01820), but of the block instead of the end loss, so that one block in memory is enough. It is what tells that
    keys and values of the few tokens everyone attends to must be exact.
    """

    def __init__(self, stats: Mapping[str, Stats], weighted: bool) -> None:
        self._stats, self._weighted = stats, weighted
        self._seen: list[tuple[Stats, Tensor, Tensor]] = []

    def of_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.add(name, args[0], output)

    def add(self, name: str, x: Tensor, output: Tensor) -> None:
        if self._weighted and output.requires_grad:
            self._seen.append((self._stats[name], x.detach(), output))
        else:
            self._stats[name].update(x)

    def settle(self, output: Tensor, generator: torch.Generator) -> None:
        """End of a batch: `output` is the block's."""
        if not self._seen:
            return
        direction = torch.randn(output.shape, generator=generator).to(output)
        gradients = torch.autograd.grad(output, [y for _, _, y in self._seen], direction, allow_unused=True)
        for (stats, x, _), gradient in zip(self._seen, gradients, strict=True):
            counts = None if gradient is None else gradient.float().square().sum(dim=-1)
            stats.update(x, counts, gradient if stats.gradients else None)
        self._seen.clear()


class ExpertProducts(TorchFunctionMode):
    """Sees every multiplication by one expert of a fused parameter."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], products: Products) -> None:
        super().__init__()
        self._products = products
        self._fused = {
            model.get_parameter(site.tensor).untyped_storage().data_ptr(): site
            for site in sites
            if site.role == "expert"
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            site = self._fused.get(weight.untyped_storage().data_ptr())
            if site is not None:
                expert = weight.storage_offset() // site.num_weights
                self._products.add(f"{site.tensor}.{expert}", args[0] if args else kwargs["input"], output)
        return output
