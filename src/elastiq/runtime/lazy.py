"""The weight of a nested matrix, for code that asks a module for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyWeight(Tensor):
    """Has the shape, dtype and device that the weight had, and takes no memory; whoever computes with it gets the
    values at the matrix's width, decoded anew each time.

    Modelling code asks for `lm_head.weight.dtype` at every token (Mamba), which must cost nothing, and some multiplies
    by `weight.T`, which must be right.
    """

    _in_dtype: Callable[[torch.dtype], Tensor]

    @staticmethod
    def __new__(
        cls, values: Callable[[torch.dtype], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        """values: the weight in a dtype."""
        weight: LazyWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._in_dtype = values
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(_decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype}, {self.device})"


def _decoded(value: Any) -> Any:
    return value._in_dtype(value.dtype) if isinstance(value, LazyWeight) else value
