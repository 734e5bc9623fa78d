"""Adapters of peft on top of nested matrices."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear

from ..core import ElastiqError


class NestedLora(Linear):
    """A LoRA adapter on a `NestedLinear`: it trains and answers as on any linear layer, and cannot be merged.

    For `LoraConfig._register_custom_module({NestedLinear: NestedLora})`.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ElastiqError: the matrix is codes, and what an adapter adds lies between them."""
        layer: Any = self.get_base_layer()
        raise ElastiqError(
            f"{layer.stored.name}: an adapter cannot be merged into nested codes; keep it on top, take it off "
            "with unload(), or merge it into the 16-bit model and quantize that"
        )
